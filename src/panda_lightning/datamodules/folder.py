"""Any folder of images."""

from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.types import PandaError


class ImageFolder(AnomalyDataModule):
    """Your own images: ``root/train/<class>/...`` and ``root/test/<class>/...``, one folder a class.

    Classes are the sorted folder names of both splits together. ``normal_class`` may be left out where ``train`` holds
    a single class. Files that are not images by their extension are ignored; subfolders are searched.
    """

    @override
    def read(self, split: Split) -> Images:
        folders = self._class_folders(split)
        if not self.classes:
            train = self._class_folders("train") if (self.root / "train").is_dir() else {}
            self.classes = tuple(sorted({*folders, *train, *self._class_folders("test")}))
            if self.normal_class is None and len(train) == 1:
                self.normal_class = next(iter(train))
        files = {name: images_below(folder) for name, folder in folders.items()}
        sources = [path for name in folders for path in files[name]]
        targets = [self.classes.index(name) for name in folders for _ in files[name]]
        if not sources:
            raise PandaError(
                f"there are no images in {self.root / split}: their names must end in {', '.join(IMG_EXTENSIONS)}."
            )
        return Images(sources, np.array(targets, dtype=np.int64))

    def _class_folders(self, split: Split) -> dict[str, Path]:
        folder = self.root / split
        found = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if not found:
            raise PandaError(
                f"{folder} {'holds no class folders' if folder.is_dir() else 'does not exist'}: expected "
                f"{self.root}/train/<normal class>/*.png and {self.root}/test/<class>/*.png; set --data.root."
            )
        return {p.name: p for p in found}


def images_below(folder: Path) -> list[Path]:
    """Files of images in a folder and its subfolders, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
