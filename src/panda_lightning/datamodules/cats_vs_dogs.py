"""Cats-vs-Dogs (Asirra), Microsoft's or Kaggle's form."""

import re
from pathlib import Path

import numpy as np
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.datamodules.download import fetch, unpack
from panda_lightning.pictures.layout import images_in
from panda_lightning.types import PandaError

BROKEN = {("cat", 666), ("dog", 11702)}  # of Microsoft's 25,000 files: empty or no image


class CatsVsDogs(AnomalyDataModule):
    """25,000 photographs of cats and dogs (Elson et al. 2007), 10,000 + 2,500 per class.

    Expects ``root/PetImages/{Cat,Dog}/<n>.jpg``, downloaded from Microsoft if missing, or Kaggle's
    ``root/train/{cat,dog}.<n>.jpg``. The split is our own, because the literature publishes none: n < 10000 for
    training, the rest for testing. Microsoft's two broken files, Cat/666 and Dog/11702, are left out.
    """

    URL = (
        "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip"
    )
    CHECKSUM = "sha256:b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9"
    classes = ("cat", "dog")
    own_split = True

    @override
    def present(self) -> bool:
        return bool(self._files())

    @override
    def obtain(self) -> None:
        unpack(fetch(self.URL, self.root, self.CHECKSUM), self.root)

    @override
    def read(self, split: Split) -> Images:
        files = self._files()
        if not files:
            raise PandaError(
                f"there are no cats and dogs in {self.root}: expected {self.root}/PetImages/Cat/<n>.jpg (Microsoft) or "
                f"{self.root}/train/cat.<n>.jpg (Kaggle); set --data.root."
            )
        chosen = sorted((name, n, path) for (name, n), path in files.items() if (n < 10000) == (split == "train"))
        missing = [f"there are no {split} images of class {c}" for c in self.classes if c not in {x[0] for x in chosen}]
        targets = [self.classes.index(name) for name, _, _ in chosen]
        return Images([path for _, _, path in chosen], np.array(targets, dtype=np.int64), problems=tuple(missing))

    def _files(self) -> dict[tuple[str, int], Path]:
        """Every image by class and number; other files (Thumbs.db) are passed over."""
        found = {}
        for base in (self.root / "PetImages", self.root / "PetImages" / "PetImages", self.root):
            for name in ("Cat", "Dog"):
                for path in images_in(base / name):
                    key = (name.lower(), int(path.stem)) if path.stem.isdecimal() else None
                    if key is not None and key not in BROKEN:
                        found[key] = path
            if found:
                return found
        for path in images_in(self.root / "train"):
            if match := re.fullmatch(r"(cat|dog)\.(\d+)", path.stem):
                found[match[1], int(match[2])] = path
        return found
