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
from panda_lightning.pictures.layout import Files, folders_in, images_in, listed, masks_of, named, passed_over
from panda_lightning.pictures.pixels import ENDINGS
from panda_lightning.types import PandaError


class ImageFolder(AnomalyDataModule):
    """Your own images: ``root/train/<class>/...`` and ``root/test/<class>/...``, one folder per class.

    Classes are the sorted names of the folders with images, of both splits together. ``normal_class`` may be left out
    if ``train`` has only one class. Subfolders are searched and links are followed; hidden files are ignored, and files
    with other endings are counted. Without ``test``, or with only normal images in it, detectors train and keep their
    bank, but there is no AUROC.

    If the class folders are directly in ``root``, without ``train`` and ``test``, ``split`` makes the split: that share
    of the normal images is for training, the rest and all other images are for testing. Images are sorted by
    sha256("<seed>/<file below root>"), so the split depends only on names; a run writes it to ``manifest.csv``.

    The optional folder ``root/ground_truth`` has the masks of anomalous images:
    ``ground_truth/<class>/<name>_mask.png`` as in MVTec AD, or a file with the image's name and any ending.
    pictures/pixels.py explains how they are read.

    ``crop`` is squash by default, because the centre of a wide image may not show the defect.

    Args:
        root: Folder of the images.
        split: Share of the normal images for training, if the folder has no ``train`` and ``test``.
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
            raise PandaError(
                f"{self.root} already has a folder train, so data.split={self.split} does not apply: leave it out."
            )
        found = self._found()
        several = [*found["train"].items(), *found["test"].items()]
        self.classes = tuple(sorted({folder.name for folder, (images, _) in several if images}))
        if not self.classes:
            raise PandaError(self._missing())
        number = {name: i for i, name in enumerate(self.classes)}
        folders = {folder: images for folder, (images, _) in found[split].items() if images}
        targets = np.repeat([number[folder.name] for folder in folders], [len(images) for images in folders.values()])
        notes = passed_over(sum((others for _, others in found[split].values()), Counter[str]()))
        if loose := len(images_in(self._above(split))):
            notes += (
                f"{loose} images directly in {self._above(split)} are ignored, because they are in no class folder.",
            )
        images = Images(Files.joined(folders.values()), targets.astype(np.int64), notes=notes)
        if self.split is not None:
            images = images.take(self._rows(split, images))
        masks = named(self.root, "ground_truth")
        if split == "train" or not masks.is_dir():
            return images
        files: Any = images.sources
        return replace(images, masks=masks_of(files, self._above("test"), masks))

    @override
    def only_class(self) -> str | None:
        train = [folder.name for folder, (images, _) in self._found()["train"].items() if images]
        return train[0] if len(train) == 1 else None

    def _found(self) -> dict[str, dict[Path, tuple[Files, Counter[str]]]]:
        """By split and class folder, what it holds; every folder is read once a run."""

        def read() -> Any:
            folders = {split: self._class_folders(split) for split in ("train", "test")}
            found = {folder: listed(folder) for folder in {*folders["train"], *folders["test"]}}
            return {split: {folder: found[folder] for folder in several} for split, several in folders.items()}

        return self._once(self._listed, "folders", (self.root, self.split), read)

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
                f"{loose} images are directly in {self.root}: put the normal ones in {self.root}/train/good and "
                "the images to score in test/good and test/bad, or use only the folders good and bad and set "
                "data.split."
            )
        if self.split is None and bare and not {"train", "test"} & set(bare):
            return (
                f"{self.root} contains {', '.join(bare[:8])}, but neither train nor test: set data.split=0.8 to "
                "train on that share of the normal class and test on the rest, or make train/<class> and "
                "test/<class>."
            )
        return (
            f"there are no images in {self.root}: expected {self.root}/train/<normal class>/*.png and "
            f"{self.root}/test/<class>/*.png, with names that end in {', '.join(ENDINGS)}; set --data.root."
        )
