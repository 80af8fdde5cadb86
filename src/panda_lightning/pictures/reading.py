"""Read images: into memory or at every access, with what is noticed on the way."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from panda_lightning.pictures.images import Images, View, relative
from panda_lightning.pictures.pixels import Source, read_mask
from panda_lightning.types import Batch, PandaError

DARK = 64  # a set whose brightest value lies below uses less than a quarter of its range


@dataclass(frozen=True)
class Drawn:
    """What a mask shows.

    Attributes:
        area: The share of its image that is anomalous.
        kept: The share of those pixels within the crop.
        visible: Whether any is left at the view's size.
        stretched: Whether the mask has other sides than the image.
    """

    area: float
    kept: float
    visible: bool
    stretched: bool


@dataclass(frozen=True)
class Facts:
    """What is worth knowing of one image, besides its pixels.

    Attributes:
        size: Upright width and height in pixels.
        mode: Pillow's word for what the file holds, or DICOM.
        turned: Whether its EXIF tag turns it.
        brightest: Its largest value after the rule for intensity.
        extremes: Its least and largest value before; only where asked for.
        drawn: What its mask shows, if it has one.
        unreadable: Why it, or its mask, cannot be read, if so.
    """

    size: tuple[int, int] = (0, 0)
    mode: str = ""
    turned: bool = False
    brightest: int = 0
    extremes: tuple[float, float] | None = None
    drawn: Drawn | None = None
    unreadable: str = ""


@dataclass(frozen=True)
class Look:
    """One image through a view: what was noticed, (3, size, size) uint8, and its mask (size, size)."""

    facts: Facts
    pixels: npt.NDArray[np.uint8] | None = None
    mask: npt.NDArray[np.bool_] | None = None


def look(view: View, source: Source, mask: Path | None = None, extremes: bool = False) -> Look:
    """Read an image and its mask; what cannot be read is said in the facts."""
    try:
        image = view.open(source)
        pixels = view.fit(image)
    except ERRORS as error:
        return Look(Facts(unreadable=_reason(source, error)))
    facts: dict[str, Any] = {"size": image.frame.size, "mode": image.mode, "turned": image.orientation != 1}
    facts |= {"brightest": int(pixels.max()), "extremes": image.extremes if extremes else None}
    if mask is None:
        return Look(Facts(**facts), pixels)
    try:
        picture, stretched = read_mask(mask, image.frame, view.mask_values, view.max_megapixels)
    except ERRORS as error:
        return Look(Facts(**facts, unreadable=f"its mask {mask.name}: {_reason(mask, error)}"))
    fitted, whole = view.fit_mask(picture), np.asarray(picture) > 0
    left, top, right, bottom = (max(0, round(edge)) for edge in view.box(picture.size))
    kept = 1.0 if view.before else float(whole[top:bottom, left:right].sum() / max(1, whole.sum()))
    drawn = Drawn(float(whole.mean()), kept, bool(fitted.any()), stretched)
    return Look(Facts(**facts, drawn=drawn), pixels, fitted)


ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # all that Pillow raises


def _reason(source: Source, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty file" if isinstance(source, Path) and not source.stat().st_size else "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"{str(error).split(',')[0]}: set data.max_megapixels"
    return str(error).rstrip(".")


def remarks(images: Images, facts: Sequence[Facts], view: View) -> tuple[list[str], list[str]]:
    """What is noticed of images and masks that were looked at: problems, and mere notes, a sentence each."""
    problems: list[str] = []
    notes: list[str] = []
    seen = [i for i, fact in enumerate(facts) if not fact.unreadable]
    masked = [(i, drawn) for i in seen if (drawn := facts[i].drawn) is not None]

    def named(rows: Sequence[int], masks: bool = False) -> str:
        paths = [
            images.masks[i] if masks and images.masks else images.sources[i] for i in rows[:5]
        ]  # arrays have no tag
        names = (relative(path, path.parents[1]) for path in paths if isinstance(path, Path))
        return f" ({', '.join(names)}{', ...' if len(rows) > 5 else ''})"

    def add(sentences: list[str], rows: Sequence[int], sentence: str, masks: bool = False) -> None:
        if rows:
            text = f"{len(rows)} of {len(masked if masks else seen)} {'masks' if masks else 'images'} {sentence}"
            sentences.append(text + named(rows, masks))

    brightest = max((facts[i].brightest for i in seen), default=255)
    if brightest < DARK and view.intensity == "auto":
        some = [images.sources[i] for i in seen[:: math.ceil(len(seen) / 16)]]
        looked = [view.open(source) for source in some]
        low, high = zip(*(image.extremes for image in looked), strict=True)
        least, most = min(low), max(high)
        bits = next((bits for bits in (8, 10, 12, 14) if most < 2**bits), 16)  # as cameras have them
        rule = f"bits:{bits}" if most > 255 and least >= 0 else f"window:{least:g},{most:g}"
        cure = "so save them as PNG, and look again" if looked[0].coarse else f"so set data.intensity={rule}"
        problems.append(
            f"{len(seen)} images reach {brightest} of 255 at most, so the network sees them nearly black: their values "
            f"lie between {least:g} and {most:g} (in {len(some)} of them), {cure}."
        )
    add(notes, [i for i in seen if facts[i].turned], "are turned as their EXIF orientation says")
    if view.crop == "center" and view.before is None and seen:
        left = [1 - view.size * min(w, h) / (view.resize * max(w, h)) for w, h in (facts[i].size for i in seen)]
        lost = 1 - sum(d.kept * d.area for _, d in masked) / max(1e-12, sum(d.area for _, d in masked))
        share = sum(left) / len(left)
        pixels = f", and {lost:.0%} of the anomalous pixels" if masked and lost >= 0.005 else ""
        if share > 0.25 or pixels:
            what = f"the centre crop leaves out {share:.0%} of the images' longer side{pixels}"
            notes.append(f"{what}; data.crop=squash keeps all of it.")
    add(problems, [i for i, d in masked if not d.area], "show no anomalous pixel", True)
    gone = [i for i, d in masked if d.area and not d.visible]
    add(problems, gone, f"lose all anomalous pixels in the crop, or at {view.size} px", True)
    add(problems, [i for i, d in masked if d.stretched], "have other sides than their images and are stretched", True)
    large = [i for i, d in masked if d.area > 0.5]
    inverted = len(large) > len(masked) / 2
    word = "cover more than half of their image" + ("; if they are inverted, set data.mask_values" if inverted else "")
    add(problems if inverted else notes, large, word, True)
    return problems, notes


@dataclass(frozen=True)
class Decoded:
    """Images that can be read.

    Attributes:
        images: They.
        rows: (N,) their places among those that were to be read.
        pixels: (N, 3, size, size) uint8, or None where they are read at every access.
        masks: (N, size, size) bool, or None where there are none, or they are read at every access.
    """

    images: Images
    rows: npt.NDArray[np.int64]
    pixels: Tensor | None
    masks: Tensor | None = None


def decoded(images: Images, view: View, in_memory: bool, skip_unreadable: bool, title: str) -> Decoded:
    """Read images, with a progress bar, and say what is noticed.

    Args:
        images: What to read.
        view: How images are resized.
        in_memory: Keep the pixels. Files are read also where they stay on disk: one that cannot be read is named now,
            not in the night.
        skip_unreadable: Leave out, and count, files that are not images, instead of raising.
        title: What the progress bar says.

    Raises:
        PandaError: Naming the files that cannot be read.
    """
    count, side = len(images), view.size
    pixels = torch.empty((count, 3, side, side), dtype=torch.uint8) if in_memory else None
    masks = torch.empty((count, side, side), dtype=torch.bool) if in_memory and images.masks is not None else None
    files = count > 0 and isinstance(images.sources[0], Path)
    facts: list[Facts] = []
    for i, seen in enumerate(looks(images, view, title) if in_memory or files else ()):
        facts.append(seen.facts)
        if pixels is not None and not seen.facts.unreadable:
            pixels.numpy()[i] = seen.pixels
            if masks is not None:
                masks.numpy()[i] = False if seen.mask is None else seen.mask
    problems, notes = remarks(images, facts, view)
    for sentence in notes:
        rank_zero_info(f"Note: {sentence}")
    for sentence in problems:
        rank_zero_warn(sentence)
    bad = [i for i, fact in enumerate(facts) if fact.unreadable]
    if not bad:
        return Decoded(images, np.arange(count), pixels, masks)
    names = [f"{images.sources[i]} ({facts[i].unreadable})" for i in bad]
    listed = "; ".join(names[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
    if not skip_unreadable or len(bad) == count:
        raise PandaError(
            f"{len(bad)} of {count} images cannot be read: {listed}. Mend or remove them"
            + ("." if skip_unreadable else ", or set data.on_error=skip.")
        )
    rank_zero_warn(f"{len(bad)} of {count} images cannot be read and are left out: {listed}")
    good = np.array([i for i, fact in enumerate(facts) if not fact.unreadable])
    kept = (None if tensor is None else tensor[good] for tensor in (pixels, masks))
    return Decoded(images.take(good), good, *kept)


def looks(images: Images, view: View, title: str, extremes: bool = False) -> Iterator[Look]:
    """Every image and mask in order, with a progress bar."""
    masks = images.masks or [None] * len(images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda i: look(view, images.sources[i], masks[i], extremes), range(len(images)))
        yield from track(found, title, total=len(images), transient=True)


class ImageDataset(Dataset[Batch]):
    """Resized uint8 images with label and index.

    Args:
        found: What to show.
        label: Of all images that were to be read: True or 1 where anomalous, or class numbers.
        view: How images are resized.

    Attributes:
        hidden: What the frozen layers of a run's network made of the images, (N, ...), which batches then show in their
            place; None shows images.
    """

    hidden: Tensor | None = None

    def __init__(self, found: Decoded, label: npt.NDArray[np.bool_] | npt.NDArray[np.int64], view: View) -> None:
        self.view = view
        self.images = found.images
        self.pixels, self.masks = found.pixels, found.masks
        self.label = torch.from_numpy(label[found.rows].astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A whole batch at once; row -1 is a filler, shown as image 0, if there is one, with index -1."""
        index = torch.tensor(rows)
        if not len(self):
            side = self.view.size
            image = torch.zeros(len(rows), 3, side, side, dtype=torch.uint8)
            return {"image": image, "label": torch.zeros_like(index), "index": index}
        real = index.clamp(min=0)
        if self.hidden is None:
            image = self.pictures(real)
        elif list(rows) == list(range(rows[0], rows[0] + len(rows))) and rows[0] >= 0:
            image = self.hidden[rows[0] : rows[0] + len(rows)]  # in order, as for the bank: no copy
        else:
            image = self.hidden[real]
        batch: Batch = {"image": image, "label": self.label[real], "index": index}
        if self.images.masks is not None:
            batch["mask"] = self._masks(self.images.masks, real)
            drawn = torch.tensor([self.images.masks[i] is not None for i in real])
            batch["has_mask"] = drawn | (batch["label"] == 0)
        return batch

    def _masks(self, files: Sequence[Path | None], rows: Tensor) -> Tensor:
        if self.masks is not None:
            return self.masks[rows]
        found = torch.zeros(len(rows), self.view.size, self.view.size, dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            if (file := files[row]) is not None:
                found.numpy()[place] = self.view.mask(file, self.images.sources[row])
        return found

    def pictures(self, rows: Tensor) -> Tensor:
        """Images (B, 3, size, size) uint8 of these rows (B,), whatever batches show."""
        if self.pixels is not None:
            return self.pixels[rows]
        return torch.from_numpy(np.stack([self.view(self.images.sources[i]) for i in rows]))


def as_is(batch: Any) -> Any:
    """Collate nothing: ``ImageDataset`` gives whole batches."""
    return batch
