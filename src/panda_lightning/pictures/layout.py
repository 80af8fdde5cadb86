"""Folders as they come: unpacked twice, linked, in a folder of their own, with other files between the images."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from panda_lightning.pictures.pixels import ENDINGS


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


def named(folder: Path, name: str) -> Path:
    """A folder in a folder by its name, in upper or lower case where it is not there as written."""
    alike = [path for path in folders_in(folder) if path.name.lower() == name]
    return folder / name if (folder / name).is_dir() or len(alike) != 1 else alike[0]


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is a system's own: hidden, macOS's, a notebook's."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, links to folders too; none where it does not exist."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not is_junk(path.name))


def images_in(folder: Path) -> list[Path]:
    """Files of images in a folder itself, sorted; none where it does not exist."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() in ENDINGS and not is_junk(path.name))


def images_below(folder: Path) -> list[Path]:
    """Files of images in a folder and its subfolders, sorted."""
    return listed(folder)[0]


def listed(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Files of images in a folder and its subfolders, sorted; and how many of what else there is, by ending.

    Links to folders are followed, but for those that lead back to a folder above; hidden and system files do not count.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    above = {}  # by folder, those that hold it
    if folder.is_dir():
        above[str(folder)] = {_identity(place) for place in (folder, *folder.absolute().parents)}
    for place, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if not is_junk(name)]
        for name in list(names):
            itself = _identity(Path(place, name))
            if itself in above[place]:
                names.remove(name)
                others["links to a folder above"] += 1
            above[os.path.join(place, name)] = above[place] | {itself}
        for name in files:
            path = Path(place, name)
            if is_junk(name):
                continue
            if path.suffix.lower() in ENDINGS and path.is_file():
                images.append(path)
            else:
                others["dead links" if not path.exists() else path.suffix.lower() or "without ending"] += 1
    return sorted(images), others


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def passed_over(others: Counter[str]) -> tuple[str, ...]:
    """A note of the files that are no images by their ending, if there are any."""
    if not others:
        return ()
    kinds = ", ".join(f"{ending} {number}" for ending, number in others.most_common())
    return (f"{others.total()} files are passed over: {kinds}. Images end in {', '.join(ENDINGS)}.",)


def masks_of(images: Sequence[Path], below: Path, masks: Path) -> list[Path | None]:
    """The masks of images: ``x_mask.*`` or ``x.*`` for ``x.*`` in the same folder below, in upper or lower case.

    Args:
        images: Files below ``below``.
        below: The folder whose folders ``masks`` repeats.
        masks: Where they are.
    """
    files = images_below(masks)
    exact = {_stem(path, masks): path for path in reversed(files)}
    loose = {stem.lower(): path for stem, path in exact.items()}

    stems = [_stem(image, below) for image in images]
    names = [(f"{stem}_mask", stem) for stem in stems]
    found = [next((exact[name] for name in several if name in exact), None) for several in names]
    free = {name: path for name, path in loose.items() if path not in found}  # what belongs to no other image
    lower = [next((free[name.lower()] for name in several if name.lower() in free), None) for several in names]
    return [mask or other for mask, other in zip(found, lower, strict=True)]


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()
