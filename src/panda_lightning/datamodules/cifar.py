"""CIFAR-10 from the official archive."""

import pickle

import numpy as np
from torchvision.datasets.utils import download_and_extract_archive
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.types import PandaError


class CIFAR10(AnomalyDataModule):
    """60,000 natural images of 32 x 32 pixels, 5,000 + 1,000 a class (Krizhevsky 2009), as official pickles.

    Expects ``root/cifar-10-batches-py/`` and fetches it if it is not there.
    """

    URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    MD5 = "c58f30108f718f92721af3b95e74349a"
    FOLDER = "cifar-10-batches-py"
    FILES: dict[Split, tuple[str, ...]] = {  # noqa: RUF012
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
    }
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    @override
    def prepare_data(self) -> None:
        if (self.root / self.FOLDER).is_dir():
            return
        try:
            download_and_extract_archive(self.URL, str(self.root), md5=self.MD5)
        except (OSError, RuntimeError) as error:
            raise PandaError(
                f"CIFAR-10 is not in {self.root / self.FOLDER} and cannot be downloaded ({error}): fetch {self.URL} "
                f"elsewhere and unpack it in {self.root}, or say where it is with --data.root."
            ) from error

    @override
    def read(self, split: Split) -> Images:
        pixels, targets = [], []
        for name in self.FILES[split]:
            path = self.root / self.FOLDER / name
            if not path.is_file():
                raise PandaError(f"{path} is missing: unpack {self.URL} in {self.root}, or set --data.root.")
            with path.open("rb") as file:
                batch = pickle.load(file, encoding="bytes")
            pixels.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            targets.extend(batch[b"labels"])
        return Images(np.concatenate(pixels), np.array(targets, dtype=np.int64))
