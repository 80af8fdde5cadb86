"""Images of a data set: where they are, and how they are resized."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from panda_lightning.pictures.pixels import Opened, Source, frame, opened, read_mask
from panda_lightning.runtime.fingerprint import fingerprint


@dataclass(frozen=True)
class Images:
    """One split of a data set, before any protocol.

    Attributes:
        sources: N files, or an array (N, H, W) or (N, H, W, 3) uint8.
        targets: (N,) class numbers.
        masks: N files of masks, None for an image that has none; or None where the data set has no masks.
        problems: What is wrong with the files but does not prevent their use, a sentence each.
        notes: What is worth knowing of them, likewise.
        rows: (N,) places in the whole split, where these are some of it.
    """

    sources: Sequence[Path] | npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]
    masks: Sequence[Path | None] | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: npt.NDArray[np.int64]) -> "Images":
        """The images of these rows, in their order."""
        sources: Any
        if isinstance(self.sources, np.ndarray) and not isinstance(self.sources, np.memmap):
            sources = self.sources[rows]
        else:  # nor is a mapped file read into memory by choosing some of it
            sources = [self.sources[i] for i in rows]
        masks = None if self.masks is None else [self.masks[i] for i in rows]
        places = rows if self.rows is None else self.rows[rows]
        return Images(sources, self.targets[rows], masks, self.problems, self.notes, places)

    def paths(self) -> list[str]:
        """Where they are: their files, or their row numbers in the split."""
        return self._called(readable)

    def names(self, root: Path) -> list[str]:
        """What they are called: their files relative to ``root``, or their row numbers in the split."""
        return self._called(lambda file: relative(file, root))

    def _called(self, by: Callable[[Path], str]) -> list[str]:
        rows = range(len(self)) if self.rows is None else self.rows
        pairs = zip(self.sources, rows, strict=True)
        return [by(source) if isinstance(source, Path) else str(row) for source, row in pairs]

    def fingerprint(self, root: Path, times: bool = False) -> str:
        """A short name: of arrays by their pixels; of files by name below ``root`` and size, without opening them.

        Args:
            root: The data set's folder; a copy elsewhere has the same name.
            times: Count also when files, and those of masks, were last changed.
        """
        if isinstance(self.sources, np.ndarray) or (len(self) and not isinstance(self.sources[0], Path)):
            return fingerprint(*(torch.from_numpy(np.ascontiguousarray(source)) for source in self.sources))
        stats = [os.stat(path) for path in self.sources]
        files = [(relative(p, root), s.st_size) for p, s in zip(self.sources, stats, strict=True)]
        masks = [None if mask is None else (str(mask), mask.stat().st_mtime_ns) for mask in self.masks or ()]
        return fingerprint(files, [[s.st_mtime_ns for s in stats], masks] if times else None)


def relative(path: Path, root: Path) -> str:
    r"""A file's name below the data set's folder, with forward slashes; bytes that are not UTF-8 as ``\xNN``."""
    return readable(Path(os.path.relpath(path, root)).as_posix())


def readable(path: str | Path) -> str:
    r"""A path as text that every file can hold: bytes that are not UTF-8 are ``\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class View:
    """How an image becomes (3, size, size) uint8; how its file is read, pictures/pixels.py says.

    Attributes:
        size: Side in pixels.
        crop: center resizes the shorter side to ``resize`` and cuts the middle; squash resizes straight to a square.
        resize: See crop.
        interpolation: bilinear or bicubic.
        before: What a data set does to image and mask first, by its name in ``BEFORE`` below.
        intensity: What becomes of values of more than 8 bits: auto, bits:N or window:LO,HI.
        mask_values: The values of masks that are anomalous; None is all but 0.
        max_megapixels: How large an image may be; None is Pillow's limit.
    """

    size: int
    crop: Literal["center", "squash"]
    resize: int
    interpolation: str
    before: str | None = None
    intensity: str = "auto"
    mask_values: tuple[int, ...] | None = None
    max_megapixels: float | None = None

    @property
    def words(self) -> dict[str, Any]:
        """What checkpoints keep of it, by the names of the data module's arguments; ``resize`` only where it counts."""
        return {
            "image_size": self.size,
            "crop": self.crop,
            "resize": self.resize if self.crop == "center" else None,
            "interpolation": self.interpolation,
            "before": self.before,
            "intensity": self.intensity,
        }

    @classmethod
    def of(cls, words: Mapping[str, Any], max_megapixels: float | None = None) -> Self:
        """The view whose ``words`` these are."""
        size, resize = words["image_size"], words["resize"] or words["image_size"]
        interpolation, before, intensity = (words[name] for name in ("interpolation", "before", "intensity"))
        return cls(size, words["crop"], resize, interpolation, before, intensity, None, max_megapixels)

    def __call__(self, source: Source) -> npt.NDArray[np.uint8]:
        """Read and resize one image: (3, size, size)."""
        return self.fit(self.open(source))

    def open(self, source: Source) -> Opened:
        """Read one image."""
        return opened(source, self.max_megapixels)

    def fit(self, image: Opened) -> npt.NDArray[np.uint8]:
        """Resize one image: (3, size, size)."""
        fitted = self._fit(image.rgb(self.intensity), Image.Resampling[self.interpolation.upper()])
        return np.asarray(fitted).transpose(2, 0, 1)

    def mask(self, mask: Path, source: Source) -> npt.NDArray[np.bool_]:
        """Read and resize the mask of an image: (size, size)."""
        return self.fit_mask(
            read_mask(mask, frame(source, self.max_megapixels), self.mask_values, self.max_megapixels)[0]
        )

    def fit_mask(self, mask: Image.Image) -> npt.NDArray[np.bool_]:
        """Resize one mask, 255 where anomalous: (size, size)."""
        return np.asarray(self._fit(mask, Image.Resampling.NEAREST)) > 0

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the view shows of an image (width, height), in its pixels."""
        if self.crop == "squash":
            return 0, 0, *size
        side = self.size * min(size) / self.resize
        left, top = ((length - side) / 2 for length in size)
        return left, top, left + side, top + side

    def _fit(self, image: Image.Image, how: Image.Resampling) -> Image.Image:
        if self.before is not None:
            side, corner, kept = BEFORE[self.before]
            image = image.resize((side, side), how).crop((corner, corner, corner + kept, corner + kept))
        if self.crop == "squash":
            return image.resize((self.size, self.size), how)
        if max(image.size) > 64 * min(image.size):  # what is cut away anyway would not fit into memory
            left, top = (max(0, (side - 4 * min(image.size)) // 2) for side in image.size)
            image = image.crop((left, top, image.width - left, image.height - top))
        scale = self.resize / min(image.size)
        width, height = (max(self.resize, round(side * scale)) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.resize((width, height), how).crop((left, top, left + self.size, top + self.size))


# What data sets do first: resize to a square of so many pixels, then cut a square out of it: its corner, its side.
BEFORE = {"crop": (512, 45, 430)}  # HyperKvasir's margins
