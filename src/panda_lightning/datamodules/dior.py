"""DIOR: objects cut out of aerial images."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info
from rich.progress import track
from typing_extensions import override

from panda_lightning.arguments import Count, Number
from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.pictures.layout import find_folder, images_in
from panda_lightning.pictures.pixels import read_rgb
from panda_lightning.runtime.whole import new_folder
from panda_lightning.types import PandaError


class DIOR(AnomalyDataModule):
    """Objects of 20 classes, cut out of 23,463 aerial images of 800 x 800 pixels (Li et al. 2020) by their boxes.

    Expects ``JPEGImages-trainval/``, ``JPEGImages-test/``, ``Annotations/Horizontal Bounding Boxes/`` and ``Main/`` (or
    ``ImageSets/Main/``) in ``root``, in a subfolder of it, or nested twice as some archives unpack. The crops are made
    once, in ``root/dior-crops-<min_side>-<side_rule>/``; after that the original images are not needed. trainval is for
    training, test for testing.

    A box is clamped to the image; its sides are then xmax - xmin and ymax - ymin in pixels. As published, sides of at
    least 120 and classes of at least 50 training crops leave 19 classes of about 649 training crops. ``classes``
    contains only these, so it is known only after the crops are listed.

    Args:
        min_side: Smallest side of a box, in pixels.
        min_count: Classes with fewer training crops are left out.
        side_rule: both: both sides are at least ``min_side``; any: at least one is.
        **kwargs: Those of AnomalyDataModule.
    """

    OFFICIAL_CLASSES = (
        "airplane",
        "airport",
        "baseballfield",
        "basketballcourt",
        "bridge",
        "chimney",
        "dam",
        "Expressway-Service-area",
        "Expressway-toll-station",
        "golffield",
        "groundtrackfield",
        "harbor",
        "overpass",
        "ship",
        "stadium",
        "storagetank",
        "tenniscourt",
        "trainstation",
        "vehicle",
        "windmill",
    )
    own_split = True

    def __init__(
        self, min_side: Count = 120, min_count: Number = 50, side_rule: Literal["both", "any"] = "both", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.min_side = min_side
        self.min_count = min_count
        self.side_rule: Literal["both", "any"] = side_rule

    @property
    def cache(self) -> Path:
        """Where the crops are."""
        return self.root / f"dior-crops-{self.min_side}-{self.side_rule}"

    @override
    def present(self) -> bool:
        return self.cache.is_dir()

    @override
    def obtain(self) -> None:
        boxes = self._find("Annotations/Horizontal Bounding Boxes")
        images: dict[Split, Path] = {
            "train": self._find("JPEGImages-trainval"),
            "test": self._find("JPEGImages-test"),
        }
        names = self._names()
        with new_folder(self.root) as part:
            crops = part / "crops"
            crops.mkdir()
            fates: Counter[tuple[str, str]] = Counter()
            problems: dict[Split, list[str]] = {"train": [], "test": []}
            for split, folder in images.items():
                files = {path.stem: path for path in images_in(folder)}
                cut = partial(_cut, files, boxes, crops / split, self.min_side, self.side_rule)
                failed = []
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    done = pool.map(cut, names[split])
                    for result in track(done, f"Cutting out {split} objects", total=len(names[split]), transient=True):
                        if isinstance(result, str):
                            failed.append(result)
                        else:
                            fates.update((class_name, _COLUMNS.get(fate, split)) for class_name, fate in result)
                if failed:
                    listed = "; ".join(failed[:8]) + (f"; and {len(failed) - 8} more" if len(failed) > 8 else "")
                    problems[split].append(
                        f"{len(failed)} of {len(names[split])} {split} images gave no crops: {listed}. Repair "
                        f"them and remove {self.cache} to cut again."
                    )
            if not (crops / "train").is_dir():
                raise PandaError(
                    f"no box of the {len(names['train'])} images of trainval.txt has {self.side_rule} side(s) of "
                    f"min_side={self.min_side} px: lower it, or repair the files. " + " ".join(problems["train"])
                )
            (crops / "problems.json").write_text(json.dumps(problems, indent=1), "utf-8")
            try:
                crops.rename(self.cache)
            except OSError:
                if not self.cache.is_dir():  # else another process was quicker
                    raise
        rank_zero_info(f"DIOR: crops in {self.cache}\n{_table(fates)}")

    @override
    @classmethod
    def problems(cls) -> tuple[str, tuple[str, ...]]:
        return "normal_class", tuple(str(number) for number in range(19))  # which ones are left, the crops say

    @override
    def read(self, split: Split) -> Images:
        if not self.cache.is_dir():
            self._names()  # says what is missing if the files are not there either
            raise PandaError(f"{self.cache} is missing: call prepare_data() first, which makes it.")
        count = {name: len(self._crops("train", name)) for name in self.OFFICIAL_CLASSES}
        self.classes = tuple(name for name in self.OFFICIAL_CLASSES if count[name] >= max(1, self.min_count))
        if not self.classes:
            raise PandaError(
                f"no class of {self.cache} has min_count={self.min_count} training crops; the largest has "
                f"{max(count.values())}: lower min_count or min_side."
            )
        files = [self._crops(split, name) for name in self.classes]
        targets = np.repeat(np.arange(len(files)), [len(paths) for paths in files])
        problems = json.loads((self.cache / "problems.json").read_text("utf-8"))[split]
        return Images([path for paths in files for path in paths], targets.astype(np.int64), problems=tuple(problems))

    def _crops(self, split: Split, class_name: str) -> list[Path]:
        return sorted((self.cache / split / class_name).glob("*.png"))

    def _names(self) -> dict[Split, list[str]]:
        """The image numbers of each split."""
        main = self._find("Main", "ImageSets/Main")
        lists: dict[Split, tuple[str, ...]] = {"train": ("trainval",), "test": ("test",)}
        if not (main / "trainval.txt").is_file():
            lists["train"] = ("train", "val")
        names: dict[Split, list[str]] = {}
        for split, parts in lists.items():
            missing = [name for name in parts if not (main / f"{name}.txt").is_file()]
            if missing:
                raise self._missing(f"{main / missing[0]}.txt")
            words = [line.split() for name in parts for line in (main / f"{name}.txt").read_text("utf-8").splitlines()]
            names[split] = list(dict.fromkeys(line[0] for line in words if line))
        return names

    def _find(self, *choices: str) -> Path:
        folder = find_folder(self.root, *choices)
        if folder is None:
            raise self._missing(str(self.root / choices[0]))
        return folder

    def _missing(self, path: str) -> PandaError:
        return PandaError(
            f"DIOR has no {path}, and no crops from an earlier run in {self.cache}: DIOR cannot be downloaded by "
            "a program, so follow the link to a cloud drive on its authors' page "
            "(https://gcheng-nwpu.github.io/#Datasets) and unpack the archives so that JPEGImages-trainval/, "
            f"JPEGImages-test/, Annotations/Horizontal Bounding Boxes/ and Main/ are in {self.root}; or set "
            "--data.root."
        )


def _letters(name: str) -> str:
    return "".join(char for char in name.lower() if "a" <= char <= "z")


_BY_LETTERS = {_letters(name): name for name in DIOR.OFFICIAL_CLASSES}
_COLUMNS = {"small": "too small", "empty": "empty"}  # a crop that is kept is counted under its split


def _objects(annotation: Path) -> list[tuple[str, list[float]]]:
    """Class name and xmin, ymin, xmax, ymax of each object of a VOC file."""
    return [
        (
            item.findtext("name", "").strip(),
            [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")],
        )
        for item in ElementTree.parse(annotation).iter("object")
    ]


def _cut(
    images: dict[str, Path], boxes: Path, target: Path, min_side: int, side_rule: Literal["both", "any"], name: str
) -> list[tuple[str, str]] | str:
    """Write one image's crops; returns class and fate (kept, small, empty) of each box, or what is wrong."""
    path = boxes / f"{name}.xml"
    try:
        objects = _objects(path)
        path = images[name]
        image = read_rgb(path)
    except (FileNotFoundError, KeyError):
        return f"{path if name in images else f'the image {name}.jpg'} is missing"
    except (ElementTree.ParseError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path} cannot be read ({error})"
    fates = []
    for number, (written, corners) in enumerate(objects):
        class_name = _BY_LETTERS.get(_letters(written))
        left, top, right, bottom = (
            round(min(max(corner, 0), limit)) for corner, limit in zip(corners, image.size * 2, strict=True)
        )
        sides = (right - left, bottom - top)
        if min(sides) <= 0:
            fate = "empty"
        elif (min if side_rule == "both" else max)(sides) < min_side:
            fate = "small"
        else:
            fate = "kept"
        if class_name and fate == "kept":
            (target / class_name).mkdir(parents=True, exist_ok=True)
            image.crop((left, top, right, bottom)).save(target / class_name / f"{name}_{number}.png")
        fates.append((class_name or f"unknown: {written}", fate))
    return fates


def _table(fates: Counter[tuple[str, str]]) -> str:
    """Crops kept in each split and boxes dropped, a line a class; classes of unknown name are dropped whole."""
    columns: Sequence[str] = ("train", "test", *_COLUMNS.values())
    lines = [f"{'class':<24}" + "".join(f"{name:>11}" for name in columns)]
    for class_name in DIOR.OFFICIAL_CLASSES:
        lines.append(f"{class_name:<24}" + "".join(f"{fates[class_name, name]:>11}" for name in columns))
    unknown: Counter[str] = Counter()
    for (class_name, _), number in fates.items():
        if class_name.startswith("unknown: "):
            unknown[class_name.removeprefix("unknown: ")] += number
    if unknown:
        listed = ", ".join(f"{name or '(no name)'} {number}" for name, number in sorted(unknown.items()))
        lines.append(f"boxes dropped for an unknown class name: {listed}")
    return "\n".join(lines)
