"""Pictures that somebody points at: folders, files, patterns, lists of them, and pictures in memory."""

import csv
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from panda_lightning.pictures.images import GAP
from panda_lightning.pictures.layout import images_below, readable
from panda_lightning.pictures.looking import look
from panda_lightning.pictures.pixels import ENDINGS, Source
from panda_lightning.pictures.shapes import kinds, shapes
from panda_lightning.pictures.view import View
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.types import Batch, PandaError

LISTS = (".txt", ".lst")
SHAPES = "uint8 arrays (H, W), (H, W, 3) or (N, H, W, 3), or uint8 tensors (H, W), (3, H, W) or (N, 3, H, W)"


@dataclass(frozen=True)
class Loose:
    """Pictures of no data set.

    Attributes:
        names: Paths as they were given, below the folder that was; of pictures in memory, their numbers.
        sources: Files, arrays and Pillow's images.
    """

    names: list[str]
    sources: list[Source]

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> list[str]:
        """Where they are."""
        return self.names

    def fingerprint(self) -> str:
        """A short name of files by name, size and time of change."""
        files = [(name, *_stat(source)) for name, source in zip(self.names, self.sources, strict=True)]
        return fingerprint(files)


def _stat(source: Source) -> tuple[int, int]:
    if not isinstance(source, Path) or not source.exists():
        return 0, 0
    stat = source.stat()
    return stat.st_size, stat.st_mtime_ns


def pointed_at(images: Any) -> Loose:
    """Find pictures.

    Args:
        images: A folder (with its subfolders), a file, a pattern with * ? or [ ], a text file (.txt, .lst) with a path
            a line (one that begins with # is a remark); an image of Pillow; uint8 arrays (H, W), (H, W, 3) or
            (N, H, W, 3); uint8 tensors (H, W), (3, H, W) or (N, 3, H, W); or several of these. Paths in a text file
            are below its folder, or else below the current one. Of several paths, one that is not there is unreadable.

    Raises:
        PandaError: If there are none, or it is none of these.
    """
    sources = list(_sources(images))
    if not sources:
        raise PandaError("there is nothing to score: the list of images is empty.")
    return Loose([readable(s) if isinstance(s, Path) else str(i) for i, s in enumerate(sources)], sources)


def _sources(images: Any) -> Iterable[Source]:
    if isinstance(images, str) and not images:
        raise PandaError("images is empty: name a folder, a file, a pattern or a text file of paths.")
    if isinstance(images, str | os.PathLike):
        return _files(Path(images).expanduser())
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Tensor):
        return _arrays(images)
    if isinstance(images, np.ndarray):
        return _arrays(images)
    if isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        return [source for one in images for source in (_named(one) or _sources(one))]
    raise PandaError(
        f"{type(images).__name__} is not an image: give a path, a Pillow image, {SHAPES}, or a list of these."
    )


def listed_paths(path: str | Path) -> set[str]:
    """The paths that a text file lists, one a line, or a table in its column path.

    Raises:
        PandaError: If it cannot be read.
    """
    lines = _lines(Path(path).expanduser())
    if Path(path).suffix.lower() != ".csv":
        return set(lines)
    rows = csv.DictReader(lines)
    if "path" not in (rows.fieldnames or ()):
        raise PandaError(f"{path} has no column path; it has {', '.join(rows.fieldnames or ('none',))}.")
    return {row["path"] for row in rows}


def _lines(path: Path) -> list[str]:
    """The lines of a text file but for empty ones and remarks."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PandaError(f"{path} is not a list of paths ({error}).") from error
    return [line for line in lines if line and not line.startswith("#")]


def _named(one: Any) -> Sequence[Path]:
    """One of several paths that is not there: it is then unreadable, and the others count."""
    lost = isinstance(one, str | os.PathLike) and not Path(one).expanduser().exists() and not has_magic(str(one))
    return [Path(one)] if lost else []


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        found = images_below(path)
        if not found:
            raise PandaError(f"there are no images in {path}: expected files that end in {', '.join(ENDINGS)}.")
        return found
    if path.suffix.lower() in LISTS and path.is_file():
        named = [Path(line).expanduser() for line in _lines(path)]
        if not named:
            raise PandaError(f"{path} lists no images: expected one path per line.")
        return [path.parent / name if (path.parent / name).exists() else name for name in named]
    if path.is_file():
        return [path]
    matching = [Path(name) for name in sorted(glob(str(path), recursive=True))]
    if not matching:
        raise PandaError(f"{path} is not a file or a folder, and as a pattern it matches nothing.")
    below = (images_below(one) if one.is_dir() else [one] for one in matching)
    return list(dict.fromkeys(chain.from_iterable(below)))  # ** matches folders, and the files in them too


def _arrays(images: Any) -> Sequence[Source]:
    kind = "a tensor" if isinstance(images, Tensor) else "an array"
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if dtype != "uint8":
        cure = f"give {SHAPES}, or a list of paths"
        if dtype.startswith(("float", "bfloat")):
            cure = "if its values lie in 0 to 1, give (255 * x).round() as uint8"
        elif dtype.startswith(("int", "uint")):
            cure = "save it as a 16-bit PNG and give its path, so that the detector's rule for intensity applies"
        raise PandaError(f"{kind} of {dtype} is not an image, only uint8 is: {cure}.")
    arrays = np.asarray(images.cpu()) if isinstance(images, Tensor) else images
    if isinstance(images, Tensor) and arrays.ndim > 2:  # channels first
        arrays = np.moveaxis(arrays, -3, -1)
    if min(shape, default=0) > 0 and arrays.ndim in (3, 4) and arrays.shape[-1] == 3:
        return [arrays] if arrays.ndim == 3 else list(arrays)
    if min(shape, default=0) > 0 and arrays.ndim == 2:
        return [arrays]
    raise PandaError(f"{kind} of shape {shape} is not an image: give {SHAPES}.")


class LooseDataset(Dataset[Batch]):
    """Pictures as a detector sees them, read at every access.

    Of one that cannot be read a batch holds zeros, and the reason in ``unreadable``.

    Args:
        images: What to show.
        view: How they are resized.
        threads: Read the images of a batch beside each other, where no worker processes do.
        rows: Which of the images there are to be shown; None for all.

    Attributes:
        kinds: See ImageDataset.
    """

    def __init__(self, images: Loose, view: View, threads: bool, rows: Sequence[int] | None = None) -> None:
        self.images = images
        self.view = view
        self.threads = threads
        self.rows = range(len(images)) if rows is None else rows
        self.shapes = shapes([images.sources[row] for row in self.rows], view)
        self.kinds = kinds(self.shapes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: Sequence[int]) -> Batch:
        places = [place for place in places if place != GAP]
        height, width = self.shapes[max(places)].tolist() if max(places) >= 0 else self.view.usual
        rows = [self.rows[place] if place >= 0 else -1 for place in places]  # -1 is a filler
        sources = [self.images.sources[row] for row in rows if row >= 0]
        if self.threads:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = list(pool.map(lambda source: look(self.view, source), sources))
        else:
            found = [look(self.view, source) for source in sources]
        image = torch.zeros((len(rows), 3, height, width), dtype=torch.uint8)
        for i, seen in enumerate(found):
            if seen.pixels is not None:
                image.numpy()[i] = seen.pixels
        index = torch.tensor(rows, dtype=torch.long)
        reasons = [seen.facts.unreadable for seen in found]
        return {"image": image, "label": torch.zeros_like(index), "index": index, "unreadable": reasons}
