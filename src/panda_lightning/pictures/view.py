"""How an image is resized, and its mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from panda_lightning.pictures.pixels import Opened, Source, frame, opened, read_mask
from panda_lightning.types import PandaError

Crop = Literal["center", "squash", "none"]
MapSize = Literal["view", "original"]  # whether maps have the pixels of what the network saw, or the image's own
THIN = 64  # how many times longer one side of an image may be before it would not fit into memory


class Steps(NamedTuple):
    """What a view does to an image, each as (width, height) in pixels.

    Attributes:
        margins: Taken away on both sides first.
        target: What the rest is resized to.
        first: Where the part that is kept begins there.
        kept: That part.
    """

    margins: tuple[int, int]
    target: tuple[int, int]
    first: tuple[int, int]
    kept: tuple[int, int]


@dataclass(frozen=True)
class View:
    """How an image becomes (3, H, W) uint8; how its file is read, pictures/pixels.py says.

    Attributes:
        size: Side of a square in pixels, or height and width; with ``crop=none`` the shorter side.
        crop: center scales the image until it covers ``resize / min(H, W)`` times H x W, and cuts the middle; squash
            resizes straight to H x W; none keeps the image's own shape, and cuts nothing.
        resize: See crop; for a square the shorter side before the cut.
        interpolation: bilinear or bicubic.
        before: What a data set does to image and mask first, by its name in ``BEFORE`` below.
        intensity: What becomes of values of more than 8 bits: auto, bits:N or window:LO,HI.
        mask_values: The values of masks that are anomalous; None is all but 0.
        max_megapixels: How large an image may be; None is Pillow's limit.
        multiple: What both sides are whole multiples of with ``crop=none``.
    """

    size: int | tuple[int, int]
    crop: Crop
    resize: int
    interpolation: str
    before: str | None = None
    intensity: str = "auto"
    mask_values: tuple[int, ...] | None = None
    max_megapixels: float | None = None
    multiple: int = 1

    @property
    def words(self) -> dict[str, Any]:
        """What checkpoints keep of it, by the names of the data module's arguments; ``resize`` only where it counts."""
        words = {
            "image_size": self.size if isinstance(self.size, int) else list(self.size),
            "crop": self.crop,
            "resize": self.resize if self.crop == "center" else None,
            "interpolation": self.interpolation,
            "before": self.before,
            "intensity": self.intensity,
        }
        return words if self.crop != "none" else {**words, "multiple": self.multiple}

    @classmethod
    def of(cls, words: Mapping[str, Any], max_megapixels: float | None = None) -> Self:
        """The view whose ``words`` these are."""
        given = words["image_size"]
        size = given if isinstance(given, int) else (given[0], given[1])
        resize = words["resize"] or (size if isinstance(size, int) else min(size))
        interpolation, before, intensity = (words[name] for name in ("interpolation", "before", "intensity"))
        multiple = words.get("multiple", 1)
        return cls(size, words["crop"], resize, interpolation, before, intensity, None, max_megapixels, multiple)

    @classmethod
    def asked(cls, size: int | Sequence[int], crop: Crop, resize: int | None, *others: Any) -> Self:
        """The view that arguments of a data module ask for; ``others`` follow in the order of the attributes.

        Raises:
            PandaError: If ``resize`` is smaller than what is cut out, or ``crop=none`` has two sides.
        """
        sides = (size, size) if isinstance(size, int) else (size[0], size[1])
        least = min(sides)
        if crop == "none" and not isinstance(size, int):
            raise PandaError(
                f"crop=none keeps each image's own shape, but image_size={list(sides)} is a fixed shape: give "
                f"only the shorter side, image_size={least}, or choose crop=center or squash."
            )
        resize = round(least / 0.875) if resize is None else resize
        if resize < least:
            raise PandaError(f"resize={resize} is smaller than image_size={least}: choose {least} or more.")
        return cls(least if sides[0] == sides[1] else sides, crop, resize, *others)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of what comes out; None where they follow each image's."""
        return None if self.crop == "none" else self.usual

    @property
    def usual(self) -> tuple[int, int]:
        """Height and width of what comes out, or where they follow each image's, of a square one."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def pixels(self) -> str:
        """The size, in words."""
        words = f"{self.size}" if isinstance(self.size, int) else " x ".join(map(str, self.size))
        return f"{words} px" + (" on the shorter side" if self.crop == "none" else "")

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what comes out of an image (width, height).

        Raises:
            ValueError: If nothing can, see ``steps``.
        """
        width, height = self.steps(self._inner(size)).kept
        return height, width

    def __call__(self, source: Source) -> npt.NDArray[np.uint8]:
        """Read and resize one image: (3, H, W)."""
        return self.fit(self.open(source))

    def open(self, source: Source) -> Opened:
        """Read one image."""
        return opened(source, self.max_megapixels)

    def fit(self, image: Opened) -> npt.NDArray[np.uint8]:
        """Resize one image: (3, H, W)."""
        fitted = self._fit(image.rgb(self.intensity), Image.Resampling[self.interpolation.upper()])
        return np.asarray(fitted).transpose(2, 0, 1)

    def mask(self, mask: Path, source: Source) -> npt.NDArray[np.bool_]:
        """Read and resize the mask of an image: (H, W)."""
        return self.fit_mask(
            read_mask(mask, frame(source, self.max_megapixels), self.mask_values, self.max_megapixels)[0]
        )

    def own_mask(self, mask: Path | None, source: Source) -> npt.NDArray[np.bool_]:
        """The mask of an image in the image's own pixels, (height, width); without a file all False."""
        image = frame(source, self.max_megapixels)
        if mask is None:
            return np.zeros(image.size[::-1], dtype=np.bool_)
        picture = read_mask(mask, image, self.mask_values, self.max_megapixels)[0]
        return np.asarray(picture.resize(image.size, Image.Resampling.NEAREST)) > 0

    def own_map(self, values: npt.NDArray[np.float32], source: Source) -> npt.NDArray[np.float32]:
        """A map (H, W) of an image in the image's own pixels, (height, width); see ``undone``."""
        found: npt.NDArray[np.float32] = self.undone(
            torch.from_numpy(values), frame(source, self.max_megapixels).size
        ).numpy()
        return found

    def fit_mask(self, mask: Image.Image) -> npt.NDArray[np.bool_]:
        """Resize one mask, 255 where anomalous: (H, W)."""
        return np.asarray(self._fit(mask, Image.Resampling.NEAREST)) > 0

    def steps(self, size: tuple[int, int]) -> Steps:
        """What becomes of an image (width, height) after ``before``.

        Raises:
            ValueError: If ``crop=none`` would make too long a picture of it.
        """
        if self.sides is None:
            assert isinstance(self.size, int)
            if max(size) > THIN * min(size):
                raise ValueError(f"{size[0]} x {size[1]} pixels are too narrow for crop=none: choose crop=center")
            width, height = (
                max(1, round(side * self.size / (min(size) * self.multiple))) * self.multiple for side in size
            )
            return Steps((0, 0), (width, height), (0, 0), (width, height))
        kept = self.sides[::-1]
        if self.crop == "squash":
            return Steps((0, 0), kept, (0, 0), kept)
        covers = [size[0] * kept[1], size[1] * kept[0]]  # each side by the other's share in the rectangle
        margins = [0, 0]
        if max(covers) > THIN * min(covers):  # what is cut away anyway would not fit into memory
            margins = [max(0, (size[i] - 4 * min(covers) // kept[1 - i]) // 2) for i in range(2)]
        rest = [size[i] - 2 * margins[i] for i in range(2)]
        scale = max(self.resize * kept[i] / (min(kept) * rest[i]) for i in range(2))
        least = [round(self.resize * side / min(kept)) for side in kept]
        target = [max(least[i], round(rest[i] * scale)) for i in range(2)]
        first = [round((target[i] - kept[i]) / 2) for i in range(2)]
        return Steps((margins[0], margins[1]), (target[0], target[1]), (first[0], first[1]), kept)

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the view shows of an image (width, height), in its pixels."""
        inner = self._inner(size)
        margins, target, first, kept = self.steps(inner)
        edges = [
            [margins[i] + at * (inner[i] - 2 * margins[i]) / target[i] for at in (first[i], first[i] + kept[i])]
            for i in range(2)
        ]
        if self.before is not None:
            side, corner, _ = BEFORE[self.before]
            edges = [[(corner + edge) * size[i] / side for edge in edges[i]] for i in range(2)]
        (left, right), (top, bottom) = edges
        return left, top, right, bottom

    def undone(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Values of a view's pixels at the pixels of the image (width, height) that it shows, bilinearly.

        Args:
            values: (H, W) floating point.
            size: The image's.

        Returns:
            (height, width), NaN where the view shows nothing.
        """
        left, top, right, bottom = self.box(size)
        for dim, low, high, length in ((0, top, bottom, size[1]), (1, left, right, size[0])):
            centre = torch.arange(length, dtype=torch.float64) + 0.5
            count = values.shape[dim]
            place = ((centre - low) / (high - low) * count - 0.5).clamp(0, count - 1)
            share = place.frac().to(values.dtype).to(values.device).view(-1, *[1] * (1 - dim))
            below = place.long().to(values.device)
            rows = values.index_select(dim, below), values.index_select(dim, (below + 1).clamp(max=count - 1))
            values = torch.lerp(*rows, share.expand_as(rows[0]))
            seen = ((centre > low) & (centre < high)).to(values.device)
            values = values.masked_fill(~seen.view(-1, *[1] * (1 - dim)), torch.nan)
        return values

    def _inner(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of what ``before`` leaves of an image."""
        return size if self.before is None else (BEFORE[self.before][2],) * 2

    def _fit(self, image: Image.Image, how: Image.Resampling) -> Image.Image:
        if self.before is not None:
            side, corner, kept = BEFORE[self.before]
            image = image.resize((side, side), how).crop((corner, corner, corner + kept, corner + kept))
        margins, target, (left, top), (width, height) = self.steps(image.size)
        if any(margins):
            image = image.crop((*margins, image.width - margins[0], image.height - margins[1]))
        image = image.resize(target, how)
        return image if target == (width, height) else image.crop((left, top, left + width, top + height))


# What data sets do first: resize to a square of so many pixels, then cut a square out of it: its corner, its side.
BEFORE = {"crop": (512, 45, 430)}  # HyperKvasir's margins
