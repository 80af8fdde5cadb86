"""Data sets in their official layouts, made for the tests."""

import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import picture
from tests.datamodules.official_medical_aerial import make_dior, make_labeled, make_segmented

# The fine classes of CIFAR-100's superclasses 0 to 19 (Krizhevsky 2009).
FINE = """
beaver dolphin otter seal whale; aquarium_fish flatfish ray shark trout; orchid poppy rose sunflower tulip;
bottle bowl can cup plate; apple mushroom orange pear sweet_pepper; clock keyboard lamp telephone television;
bed chair couch table wardrobe; bee beetle butterfly caterpillar cockroach; bear leopard lion tiger wolf;
bridge castle house road skyscraper; cloud forest mountain plain sea; camel cattle chimpanzee elephant kangaroo;
fox porcupine possum raccoon skunk; crab lobster snail spider worm; baby boy girl man woman;
crocodile dinosaur lizard snake turtle; hamster mouse rabbit shrew squirrel;
maple_tree oak_tree palm_tree pine_tree willow_tree; bicycle bus motorcycle pickup_truck train;
lawn_mower rocket streetcar tank tractor
"""
SUPERCLASS = {name: number for number, names in enumerate(FINE.split(";")) for name in names.split()}


def pack_cifar(folders: Path, root: Path, coarse: bool = False) -> None:
    """Pack image folders {train,test}/<class>/ into the official pickles; coarse by CIFAR-100's superclasses."""
    names = sorted(p.name for p in (folders / "test").iterdir())
    for split in ("train", "test"):
        images, targets = [], []
        for name in names:
            for path in sorted((folders / split / name).glob("*")):
                images.append(np.asarray(Image.open(path).convert("RGB")))
                targets.append(SUPERCLASS[name] if coarse else names.index(name))
        write = write_cifar100 if coarse else write_cifar10
        write(root, np.stack(images), np.array(targets), split)


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its str: the official pickles are of that age."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text: bytes) -> None:
        small = len(text) < 256
        self.write((b"U" + bytes([len(text)]) if small else b"T" + struct.pack("<i", len(text))) + text)

    dispatch[bytes] = save_bytes


def write_cifar(
    folder: Path, images: np.ndarray, targets: np.ndarray, names: list[str], key: bytes = b"labels"
) -> None:
    """Write (N, 32, 32, 3) uint8 images as official pickles: one file a name."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for name, part in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
        batch = {b"data": rows[part], key: targets[part].tolist(), b"batch_label": name.encode()}
        with (folder / name).open("wb") as file:
            _Python2Pickler(file, protocol=2).dump(batch)


def write_cifar10(root: Path, images: np.ndarray, targets: np.ndarray, split: str) -> None:
    """One split of CIFAR-10: five training batches, or one of test."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    write_cifar(root / "cifar-10-batches-py", images, targets, names)


def write_cifar100(root: Path, images: np.ndarray, coarse: np.ndarray, split: str) -> None:
    """One split of CIFAR-100 by its superclasses."""
    write_cifar(root / "cifar-100-python", images, coarse, [split], b"coarse_labels")


def _shades(size: int, side: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise (size, side, side, 3), each class a shade of its own, and the classes in turn."""
    targets = np.arange(size) % classes
    noise = np.random.default_rng(size).integers(0, 60, (size, side, side, 3))
    return (noise + targets[:, None, None, None] * (190 // classes)).astype(np.uint8), targets


def make_cifar10(root: Path, train: int = 50, test: int = 20) -> None:
    """A small CIFAR-10 of noise."""
    for split, size in (("train", train), ("test", test)):
        write_cifar10(root, *_shades(size, 32, 10), split)


def make_cifar100(root: Path, train: int = 60, test: int = 40) -> None:
    """A small CIFAR-100 of noise."""
    for split, size in (("train", train), ("test", test)):
        write_cifar100(root, *_shades(size, 32, 20), split)


def make_fashion_mnist(root: Path, train: int = 50, test: int = 20) -> None:
    """A small Fashion-MNIST of noise, as idx files."""
    folder = root / "FashionMNIST/raw"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, size in (("train", train), ("t10k", test)):
        images, targets = _shades(size, 28, 10)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, size, 28, 28) + images[..., 0].tobytes()
        )
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, size) + targets.astype(np.uint8).tobytes()
        )


def make_cats_vs_dogs(root: Path, form: str = "microsoft", train: int = 6, test: int = 4) -> None:
    """A small Cats-vs-Dogs: spots are cats, stripes are dogs."""
    for name, kind in (("Cat", "spot"), ("Dog", "stripe")):
        for n in (*range(train), *range(10000, 10000 + test)):
            path = root / f"PetImages/{name}/{n}.jpg" if form == "microsoft" else root / f"train/{name.lower()}.{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(kind, n).save(path)


def make_mvtec(root: Path, category: str = "bottle", mode: str = "RGB", train: int = 6, test: int = 4) -> None:
    """One category of MVTec AD: spots are good, stripes are broken, a mask covers the upper half."""
    for folder, kind, numbers in (
        ("train/good", "spot", range(train)),
        ("test/good", "spot", range(100, 100 + test)),
        ("test/broken", "stripe", range(test)),
    ):
        (root / category / folder).mkdir(parents=True)
        for i, n in enumerate(numbers):
            picture(kind, n).convert(mode).save(root / category / folder / f"{i:03d}.png")
    truth = root / category / "ground_truth/broken"
    truth.mkdir(parents=True)
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[:20] = 255
    for i in range(test):
        Image.fromarray(mask).save(truth / f"{i:03d}_mask.png")


def make_everything(root: Path) -> None:
    """All data sets of the project that have files, small, in one root."""
    make_cifar10(root)
    make_cifar100(root)
    make_fashion_mnist(root)
    make_cats_vs_dogs(root)
    make_mvtec(root)
    boxes = {f"{n:05d}": [("ship", (2, 2, 40, 40)), ("harbor", (30, 10, 70, 50))] for n in range(1, 7)}
    make_dior(root, boxes, {f"{n:05d}": objects for n, objects in zip(range(11, 14), boxes.values(), strict=False)})
    make_labeled(root, {"cecum": 6, "ileum": 4})
    make_segmented(root)
