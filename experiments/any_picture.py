"""The same pictures in other files: python experiments/any_picture.py ROOT NETWORK [WORK].

ROOT holds ../shared/data unpacked (cats_vs_dogs and mvtec), NETWORK is a folder of weights. Each line is a pair of
runs: DN2 on 500 cats, tested on 250 cats and 250 dogs, at 160 px, and PatchCore on leather at 224 px, with the plain
files and with the same pictures, or masks, in another form. Also runs on commits before these forms were read right.
"""

import shutil
import sys
import tempfile
import warnings
from inspect import signature
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.pictures.files import redraw, reencode

from panda_lightning import DN2, ImageFolder, MVTecAD, PandaError, PatchCore
from panda_lightning.datamodules import AnomalyDataModule

PICTURES = ("grey", "16", "12", "10", "int32", "float", "dicom", "monochrome1", "colour", "turned")
DRAWINGS = ("white", "one", "hundred", "palette", "red", "transparent", "double", "plain_name", "bmp", "upper", "jpeg")


def tested(detector, data) -> dict[str, float] | str:
    """The metrics of a test, or the sentence that refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                             default_root_dir=folder)  # fmt: skip
        try:
            return trainer.test(detector, data, verbose=False)[0]
        except (PandaError, ValueError) as error:
            return str(error)[:150]


def folder(cls, intensity="auto", **options):
    """A data set, with the rule for intensity where this commit knows one."""
    rule = {"intensity": intensity} if "intensity" in signature(AnomalyDataModule.__init__).parameters else {}
    return cls(**options, **rule)


def cats_and_dogs(root: Path):
    """Split, class and file of the pictures."""
    for name, kind in (("Cat", "cat"), ("Dog", "dog")):
        train = 500 if kind == "cat" else 0
        for number in [*range(train), *range(10000, 10250)]:
            path = root / f"cats_vs_dogs/PetImages/{name}/{number}.jpg"
            if path.is_file() and path.stat().st_size:
                yield ("train" if number < 10000 else "test"), kind, path


def show(name: str, found, *keys: str) -> None:
    """A line of the table."""
    cells = [f"{found[key]:.4f}" if key in found else "-" for key in keys] if isinstance(found, dict) else [found]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(root: Path, network: str, work: Path) -> None:
    """Print the tables."""
    warnings.filterwarnings("ignore")
    files = list(cats_and_dogs(root))
    print("| pictures | AUROC |\n|---|---|")
    for kind in PICTURES:
        rules = {reencode(path, work / kind / split / label / path.stem, kind) for split, label, path in files}
        data = folder(
            ImageFolder, rules.pop(), root=str(work / kind), normal_class="cat", image_size=160, crop="squash"
        )
        show(kind, tested(DN2(network), data), "test/auroc")
        shutil.rmtree(work / kind)
    dogs = sorted((root / "cats_vs_dogs/PetImages/Dog").glob("*.jpg"))
    cats = sorted((root / "cats_vs_dogs/PetImages/Cat").glob("*.jpg"))
    for number in range(400):
        split, label = ("train", "dogs") if number < 200 else ("test", "dogs" if number < 300 else "cat")
        wide = Image.new("RGB", (540, 180))
        for place in range(3):
            pool = cats if label == "cat" and not place else dogs
            wide.paste(Image.open(pool[3 * number + place]).convert("RGB").resize((180, 180)), (180 * place, 0))
        (work / f"wide/{split}/{label}").mkdir(parents=True, exist_ok=True)
        wide.save(work / f"wide/{split}/{label}/{number:03d}.png")
    for crop in (None, "center", "squash"):
        data = ImageFolder(
            root=str(work / "wide"), normal_class="dogs", image_size=192, **({"crop": crop} if crop else {})
        )
        show(f"three wide, a cat on the left, crop {crop or 'as it comes'}", tested(DN2(network), data), "test/auroc")
    print("\n| masks | AP | PRO |\n|---|---|---|")
    for kind in DRAWINGS:
        shutil.copytree(root / "mvtec/leather", work / "masks/leather", dirs_exist_ok=True)
        shutil.rmtree(work / "masks/leather/ground_truth")
        masks = sorted((root / "mvtec/leather/ground_truth").rglob("*.png"))
        for path in masks:
            stem = path.stem.removesuffix("_mask")
            redraw(path, work / "masks/leather/ground_truth" / path.parent.name / stem, kind)
        data = folder(MVTecAD, root=str(work / "masks"), category="leather", image_size=224, crop="squash")
        show(kind, tested(PatchCore(network), data), "test/pixel_ap", "test/pro")
        shutil.rmtree(work / "masks")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3] if len(sys.argv) > 3 else scratch))
