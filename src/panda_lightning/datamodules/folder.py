"""Any folder of images."""

from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.datamodules.layout import images_below
from panda_lightning.types import PandaError


class ImageFolder(AnomalyDataModule):
    """Your own images: ``root/train/<class>/...`` and ``root/test/<class>/...``, one folder a class.

    Classes are the sorted folder names of both splits together. ``normal_class`` may be left out where ``train`` holds
    a single class. Files that are not images by their extension are ignored; subfolders are searched. A folder
    ``root/ground_truth`` holds the masks of anomalous test images, if any, white where anomalous:
    ``ground_truth/<class>/<name>_mask.png`` as in MVTec AD, or an image of the same name.
    """

    @override
    def read(self, split: Split) -> Images:
        folders = self._class_folders(split)
        train = self._class_folders("train") if (self.root / "train").is_dir() else {}
        self.classes = tuple(sorted({*folders, *train, *self._class_folders("test")}))
        files = {name: images_below(folder) for name, folder in folders.items()}
        sources = [path for name in folders for path in files[name]]
        targets = [self.classes.index(name) for name in folders for _ in files[name]]
        if not sources:
            raise PandaError(
                f"there are no images in {self.root / split}: their names must end in {', '.join(IMG_EXTENSIONS)}."
            )
        images = Images(sources, np.array(targets, dtype=np.int64))
        if split == "train" or not (self.root / "ground_truth").is_dir():
            return images
        anomalous = self.is_anomalous(images.targets)
        return images.with_masks([self._mask(p) if a else None for p, a in zip(sources, anomalous, strict=True)])

    @override
    def only_class(self) -> str | None:
        train = self._class_folders("train") if (self.root / "train").is_dir() else {}
        return next(iter(train)) if len(train) == 1 else None

    def _mask(self, image: Path) -> Path:
        place = self.root / "ground_truth" / image.relative_to(self.root / "test")
        usual = place.with_name(f"{image.stem}_mask.png")
        same = (place.with_suffix(suffix) for suffix in (image.suffix, ".png"))
        return next((p for p in (usual, *same) if p.is_file()), usual)

    def _class_folders(self, split: Split) -> dict[str, Path]:
        folder = self.root / split
        found = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if not found:
            raise PandaError(
                f"{folder} {'holds no class folders' if folder.is_dir() else 'does not exist'}: expected "
                f"{self.root}/train/<normal class>/*.png and {self.root}/test/<class>/*.png; set --data.root."
            )
        return {p.name: p for p in found}
