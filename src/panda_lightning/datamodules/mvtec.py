"""MVTec AD: industrial objects and textures with pixel masks."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.datamodules.download import fetch, unpack
from panda_lightning.pictures.layout import Files, folders_in, listed, masks_of, passed_over
from panda_lightning.types import PandaError

CATEGORIES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip


class MVTecAD(AnomalyDataModule):
    """One of 15 categories of MVTec AD (Bergmann et al. 2019), CC BY-NC-SA 4.0; official split.

    Expects ``root/<category>/{train/good, test/<kind>, ground_truth/<kind>}``, also below ``root/mvtec`` or
    ``root/mvtec_anomaly_detection``. Masks are paired with images by name, as in ImageFolder.

    Args:
        category: bottle, cable, capsule, carpet, grid, hazelnut, leather, metal_nut, pill, screw, tile, toothbrush,
            transistor, wood or zipper; or any other folder with this layout.
        accept_license: Download the data set (5 GB) under its licence, which forbids commercial use.
        kwargs: See AnomalyDataModule; the normal class is "good".
    """

    URL = (
        "https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f282/download/420938113-1629952094/"
        "mvtec_anomaly_detection.tar.xz"
    )
    CHECKSUM = "sha256:cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"

    def __init__(self, category: str = "bottle", accept_license: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.category = category
        self.accept_license = accept_license

    @override
    @classmethod
    def problems(cls) -> tuple[str, tuple[str, ...]]:
        return "category", CATEGORIES

    @override
    def only_class(self) -> str:
        return "good"

    @property
    @override
    def problem(self) -> dict[str, str]:
        return {"category": self.category, **super().problem}

    @override
    def present(self) -> bool:
        return self._folder() is not None

    @override
    def obtain(self) -> None:
        if self.category not in CATEGORIES:
            raise PandaError(
                f"category={self.category} is neither a folder in {self.root} nor one of MVTec AD: "
                f"{', '.join(CATEGORIES)}."
            )
        if not self.accept_license:
            raise PandaError(
                f"{self.category} is not in {self.root}. MVTec AD may be used under CC BY-NC-SA 4.0, not commercially: "
                "set --data.accept_license true to download it (5 GB), or unpack it there and set --data.root."
            )
        unpack(fetch(self.URL, self.root, self.CHECKSUM), self.root / "mvtec")

    @override
    def read(self, split: Split) -> Images:
        folder = self._folder()
        if folder is None:
            raise PandaError(f"{self.root / self.category} does not exist: set --data.root to the categories' folder.")
        found = {kind: listed(kind) for name in ("train", "test") for kind in folders_in(folder / name)}
        self.classes = ("good", *sorted({kind.name for kind, (images, _) in found.items() if images} - {"good"}))
        kinds = [kind for kind in found if kind.parent.name == split]
        paths = Files.joined(found[kind][0] for kind in kinds)
        if not paths:
            raise PandaError(f"there are no images in {folder / split}: expected {folder / split}/good/000.png, ...")
        targets = np.array([self.classes.index(kind.name) for kind in kinds for _ in found[kind][0]], dtype=np.int64)
        masks = None if split == "train" else masks_of(paths, folder / "test", folder / "ground_truth")
        notes = passed_over(sum((found[kind][1] for kind in kinds), Counter[str]()))
        return Images(paths, targets, masks, notes=notes)

    def _folder(self) -> Path | None:
        bases = (self.root, self.root / "mvtec", self.root / "mvtec_anomaly_detection")
        places = [p for base in bases for p in (base / self.category, base / self.category / self.category)]
        return next((p for p in places if (p / "test").is_dir() or (p / "train").is_dir()), None)
