"""Folders as they come: unpacked twice, in a folder of their own, with other files between the images."""

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS


def find_folder(root: Path, *choices: str) -> Path | None:
    """The folder of one of these paths in root or in a folder of it; where it is doubled, the inner one."""
    for above in ("", "*/"):
        for choice in choices:
            first, last = choice.split("/")[0], choice.split("/")[-1]
            for pattern in (f"{choice}/{last}", f"{first}/{choice}", choice):
                for path in sorted(root.glob(above + pattern)):
                    if path.is_dir():
                        return path
    return None


def images_below(folder: Path) -> list[Path]:
    """Files of images in a folder and its subfolders, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
