"""Fashion-MNIST from the official idx files."""

import gzip
from pathlib import Path
from typing import ClassVar

import numpy as np
from torchvision.datasets import FashionMNIST as Official
from torchvision.datasets.mnist import read_image_file, read_label_file
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.datamodules.download import fetch
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import PandaError


class FashionMNIST(AnomalyDataModule):
    """70,000 grey images of clothes, 28 x 28 pixels, 6,000 + 1,000 per class (Xiao et al. 2017, MIT licence).

    Expects the four idx files in ``root/FashionMNIST/raw/``, plain or gzipped, and downloads missing ones. Official
    split.
    """

    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    stem: ClassVar[dict[Split, str]] = {"train": "train", "test": "t10k"}

    @property
    def _raw(self) -> Path:
        return self.root / "FashionMNIST" / "raw"

    @override
    def present(self) -> bool:
        return all((self._raw / name.removesuffix(".gz")).is_file() for name, _ in Official.resources)

    @override
    def obtain(self) -> None:
        for name, md5 in Official.resources:  # the addresses and checksums that torchvision keeps up to date
            plain = self._raw / name.removesuffix(".gz")
            if not plain.is_file():
                packed = fetch(Official.mirrors[0] + name, self._raw, f"md5:{md5}")
                with gzip.open(packed) as source, new_file(plain) as part:
                    part.write_bytes(source.read())

    @override
    def read(self, split: Split) -> Images:
        paths = [self._raw / f"{self.stem[split]}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        for path in paths:
            if not path.is_file():
                raise PandaError(
                    f"{path} is missing: put the idx files of {Official.mirrors[0]} there, or set --data.root."
                )
        pixels, targets = read_image_file(str(paths[0])), read_label_file(str(paths[1]))
        return Images(pixels.numpy(), targets.numpy().astype(np.int64))
