"""Hyper-Kvasir: polyps in colonoscopy."""

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from panda_lightning.arguments import Count, Number, Seed
from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.pictures.layout import find_folder, images_below
from panda_lightning.types import PandaError


class HyperKvasir(AnomalyDataModule):
    """Colonoscopy (Borgli et al. 2020): 2,166 normal images for training, 1,000 polyps with masks to detect.

    Expects ``labeled-images/`` and ``segmented-images/{images,masks}/`` in ``root``, in a subfolder of it, or nested
    twice. The normal images are cecum, ileum and bbps-2-3 of the lower tract, according to the folders and the CSV
    files of labels. The anomalous images are the segmented polyps; the polyps in ``labeled-images`` are the same images
    and are never used.

    The split of the normal images is our own: they are sorted by sha256("<split_seed>/<file name without suffix>"); the
    first ``test_normals`` are for testing, the others for training. The split therefore does not depend on where the
    files are or on the order in which they are listed.

    Black margins differ between the two sources and reveal the label: ``crop_margins`` resizes image and mask to 512 x
    512 pixels and keeps (45, 45, 475, 475) before the usual resizing. Results without it are not comparable.

    Args:
        normal_class: normal or polyp.
        test_normals: Number of normal test images.
        split_seed: Seed of the split.
        crop_margins: Crop the black margins first.
        **kwargs: Those of AnomalyDataModule.
    """

    NORMAL = ("cecum", "ileum", "bbps23")  # as canonical() writes them
    classes = ("normal", "polyp")
    own_split = True

    def __init__(
        self,
        normal_class: str | Number = "normal",
        test_normals: Count = 500,
        split_seed: Seed = 0,
        crop_margins: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(normal_class=normal_class, **kwargs)
        self.test_normals = test_normals
        self.split_seed = split_seed
        self.crop_margins = crop_margins

    @override
    @classmethod
    def problems(cls) -> tuple[str, tuple[str, ...]]:
        return "normal_class", ("normal",)

    @property
    @override
    def before(self) -> str | None:
        return "crop" if self.crop_margins else None

    @override
    def read(self, split: Split) -> Images:
        normals, problems = self._normals()
        ranked = sorted(normals, key=lambda name: hashlib.sha256(f"{self.split_seed}/{name}".encode()).digest())
        if split == "train":
            if not normals:
                raise PandaError(" ".join(problems) or self._missing("labeled-images/lower-gi-tract"))
            chosen = sorted(ranked[self.test_normals :])
            if not chosen:
                raise PandaError(
                    f"test_normals={self.test_normals} of {len(normals)} normal images leaves none to train on: "
                    "choose fewer."
                )
            return Images([normals[name] for name in chosen], np.zeros(len(chosen), dtype=np.int64), None, problems)
        folder = find_folder(self.root, "segmented-images")
        polyps = _by_stem(folder / "images") if folder else {}
        if folder is None or not polyps:
            raise PandaError(self._missing("segmented-images/images"))
        chosen = sorted(ranked[: self.test_normals])
        targets = np.repeat(np.array([0, 1], dtype=np.int64), [len(chosen), len(polyps)])
        sources = [normals[name] for name in chosen] + [polyps[name] for name in sorted(polyps)]
        drawn = _by_stem(folder / "masks")
        masks = [None for _ in chosen] + [drawn.get(name) for name in sorted(polyps)]
        return Images(sources, targets, masks, problems)

    def _normals(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        """The normal images by file name without suffix, and what is wrong with them."""
        folder = find_folder(self.root, "labeled-images")
        if folder is None:
            return {}, (self._missing("labeled-images"),)
        files = _by_stem(folder)
        listed: set[str] = set()
        for path in {*self.root.glob("*.csv"), *folder.parent.glob("*.csv"), *folder.glob("*.csv")}:
            listed |= _normal_rows(path)
        normals = {
            name: path
            for name, path in files.items()
            if name in listed or ("lower-gi-tract" in path.parts and canonical(path.parent.name) in self.NORMAL)
        }
        absent = sorted(listed - files.keys())
        if absent:
            problem = (
                f"{len(absent)} of the {len(listed)} normal images in the CSV files of labels have no file in "
                f"{folder} ({_listed(absent)}): unpack hyper-kvasir-labeled-images.zip again."
            )
            return normals, (problem,)
        return normals, () if normals else (self._missing("labeled-images/lower-gi-tract"),)

    def _missing(self, what: str) -> str:
        return (
            f"Hyper-Kvasir has no images in {self.root / what}: agree to the terms at "
            "https://datasets.simula.no/hyper-kvasir, download hyper-kvasir-labeled-images.zip and "
            f"hyper-kvasir-segmented-images.zip, and unpack both in {self.root}, so that "
            "labeled-images/lower-gi-tract/*/<class>/*.jpg and segmented-images/{images,masks}/*.jpg are there; or "
            "set --data.root."
        )


def canonical(class_name: str) -> str:
    """One spelling of a class: normal-cecum, Cecum and cecum are cecum; BBPS 2-3 and bbps-2-3 are bbps23."""
    name = "".join(char for char in class_name.lower() if char.isalnum())
    return name.removeprefix("normal").removeprefix("terminal")


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in images_below(folder)}


def _normal_rows(path: Path) -> set[str]:
    """File names without suffix of the rows with a normal class in any column; none where it lists no images."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline()
        delimiter = ";" if ";" in header else ","
        if canonical(header.split(delimiter)[0]) not in ("filename", "videofile"):
            return set()
        rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    return {Path(row[0]).stem for row in rows if any(canonical(cell) in HyperKvasir.NORMAL for cell in row[1:])}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
