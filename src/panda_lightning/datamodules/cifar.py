"""CIFAR-10 and CIFAR-100 from the official archives."""

import pickle
from typing import ClassVar

import numpy as np
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.datamodules.download import fetch, unpack
from panda_lightning.types import PandaError


class CIFAR10(AnomalyDataModule):
    """60,000 natural images of 32 x 32 pixels, 5,000 + 1,000 a class (Krizhevsky 2009), as official pickles.

    Expects ``root/cifar-10-batches-py/`` and fetches it if it is not there. Official split.
    """

    url: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    checksum: ClassVar[str] = "md5:c58f30108f718f92721af3b95e74349a"
    folder: ClassVar[str] = "cifar-10-batches-py"
    label_key: ClassVar[bytes] = b"labels"
    files: ClassVar[dict[Split, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
    }
    classes: tuple[str, ...] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    @override
    def present(self) -> bool:
        return (self.root / self.folder).is_dir()

    @override
    def obtain(self) -> None:
        unpack(fetch(self.url, self.root, self.checksum), self.root)

    @override
    def read(self, split: Split) -> Images:
        pixels, targets = [], []
        for name in self.files[split]:
            path = self.root / self.folder / name
            if not path.is_file():
                raise PandaError(f"{path} is missing: unpack {self.url} in {self.root}, or set --data.root.")
            with path.open("rb") as file:
                batch = pickle.load(file, encoding="bytes")
            pixels.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            targets.extend(batch[self.label_key])
        return Images(np.concatenate(pixels), np.array(targets, dtype=np.int64))


class CIFAR100(CIFAR10):
    """CIFAR-100 by its 20 superclasses, 2,500 + 500 images each (Krizhevsky 2009), as official pickles.

    Expects ``root/cifar-100-python/`` and fetches it if it is not there. Official split, ``coarse_labels``.
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    checksum = "md5:eb9058c3a382ffc7106e4002c42a8d85"
    folder = "cifar-100-python"
    label_key = b"coarse_labels"
    files: ClassVar[dict[Split, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    classes = (
        "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
        "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
        "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
        "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
    )  # fmt: skip
