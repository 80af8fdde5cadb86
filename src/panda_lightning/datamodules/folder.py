"""Any folder of images."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from panda_lightning.arguments import OpenShare
from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.pictures.layout import folders_in, images_in, listed, masks_of, named, passed_over
from panda_lightning.pictures.pixels import ENDINGS
from panda_lightning.types import PandaError


class ImageFolder(AnomalyDataModule):
    """Your own images: ``root/train/<class>/...`` and ``root/test/<class>/...``, one folder a class.

    Classes are the sorted names of the folders with images, of both splits together. ``normal_class`` may be left out
    where ``train`` holds a single class. Subfolders are searched, and links followed; hidden files are no images, and
    files with other endings are counted. Without ``test``, or with normal images alone in it, detectors train and keep
    their bank, and there is no AUROC.

    Where the classes lie in ``root`` itself, without ``train`` and ``test``, ``split`` makes them: that share of the
    normal images trains, the rest and all others test. Images are put in the order of sha256("<seed>/<file below
    root>"), so that the split depends on names alone; a run writes it to ``manifest.csv``.

    A folder ``root/ground_truth`` holds the masks of anomalous images, if any: ``ground_truth/<class>/<name>_mask.png``
    as in MVTec AD, or a file of the image's name, with any ending. How they are read: pictures/pixels.py.

    ``crop`` is squash by default, for the middle of a wide picture may not hold the defect.

    Args:
        root: Folder of the images.
        split: Share of the normal images that train, where the folder has no ``train`` and ``test``.
        kwargs: See AnomalyDataModule.
    """

    default_crop: Literal["center", "squash"] = "squash"

    def __init__(self, root: str = "data", split: OpenShare | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.split = split

    @property
    @override
    def own_split(self) -> bool:  # type: ignore[override]
        return self.split is not None

    @override
    def read(self, split: Split) -> Images:
        if self.split is not None and named(self.root, "train").is_dir():
            raise PandaError(f"{self.root} has a folder train already, so data.split={self.split} is not for it.")
        folders = {name: self._class_folders(name) for name in ("train", "test")}
        found = {folder: listed(folder) for several in folders.values() for folder in several}
        self.classes = tuple(sorted({folder.name for folder, (images, _) in found.items() if images}))
        if not self.classes:
            raise PandaError(self._missing())
        sources = [path for folder in folders[split] for path in found[folder][0]]
        targets = [self.classes.index(folder.name) for folder in folders[split] for _ in found[folder][0]]
        others = sum((found[folder][1] for folder in folders[split]), Counter[str]())
        notes = passed_over(others)
        if loose := len(images_in(self._above(split))):
            notes += (f"{loose} images in {self._above(split)} itself are passed over, for they are in no class.",)
        images = Images(sources, np.array(targets, dtype=np.int64), notes=notes)
        if self.split is not None:
            images = images.take(self._rows(split, images))
        masks = named(self.root, "ground_truth")
        if split == "train" or not masks.is_dir():
            return images
        files: Any = images.sources
        return replace(images, masks=masks_of(files, self._above("test"), masks))

    @override
    def only_class(self) -> str | None:
        train = [folder.name for folder in self._class_folders("train") if listed(folder)[0]]
        return train[0] if len(train) == 1 and self.split is None else None

    def _rows(self, split: Split, images: Images) -> Any:
        """Rows of the images that train, or that test, of a folder without train and test."""
        normal = np.flatnonzero(~self.is_anomalous(images.targets))
        names = self.names(images.take(normal))
        order = sorted(range(len(normal)), key=lambda i: hashlib.sha256(f"{self.seed}/{names[i]}".encode()).digest())
        train = normal[sorted(order[: round(len(order) * (self.split or 0))])]
        return train if split == "train" else np.setdiff1d(np.arange(len(images)), train)

    def _above(self, split: Split) -> Path:
        return self.root if self.split is not None else named(self.root, split)

    def _class_folders(self, split: Split) -> list[Path]:
        return [folder for folder in folders_in(self._above(split)) if folder.name.lower() != "ground_truth"]

    def _missing(self) -> str:
        found = [folder.name for folder in folders_in(self.root) if listed(folder)[0]]
        bare = [name for name in found if name.lower() != "ground_truth"]
        if loose := len(images_in(self.root)):
            return (
                f"{loose} images lie in {self.root} itself: put the normal ones in {self.root}/train/good, and what is "
                "to be scored in test/good and test/bad, or set data.split for good and bad alone."
            )
        if self.split is None and bare and not {"train", "test"} & set(bare):
            return (
                f"{self.root} holds {', '.join(bare[:8])}, but neither train nor test: set data.split=0.8 to train on "
                "that share of the normal class and test on the rest, or make train/<class> and test/<class>."
            )
        return (
            f"there are no images in {self.root}: expected {self.root}/train/<normal class>/*.png and "
            f"{self.root}/test/<class>/*.png, with names that end in {', '.join(ENDINGS)}; set --data.root."
        )
