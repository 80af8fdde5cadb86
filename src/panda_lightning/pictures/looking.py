"""What is noticed of images and masks when they are read for the first time."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track

from panda_lightning.pictures.layout import Files, relative
from panda_lightning.pictures.pixels import Source, read_mask
from panda_lightning.pictures.view import View
from panda_lightning.types import PandaError

SAMPLE = 5000  # of files that stay on disk so many are looked at beforehand: some 40 s on two processors
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
    """One image through a view: what was noticed, (3, H, W) uint8, and its mask (H, W)."""

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
    facts |= {"brightest": int(np.max(pixels)), "extremes": image.extremes if extremes else None}
    if mask is None:
        return Look(Facts(**facts), pixels)
    try:
        picture, stretched = read_mask(mask, image.frame, view.mask_values, view.max_megapixels)
    except ERRORS as error:
        return Look(Facts(**facts, unreadable=f"its mask {mask.name}: {_reason(mask, error)}"))
    fitted, whole = view.fit_mask(picture), np.asarray(picture) > 0
    left, top, right, bottom = (max(0, round(edge)) for edge in view.box(picture.size))
    kept = 1.0 if view.before else float(whole[top:bottom, left:right].sum() / max(1, int(whole.sum())))
    drawn = Drawn(float(whole.mean()), kept, bool(fitted.any()), stretched)
    return Look(Facts(**facts, drawn=drawn), pixels, fitted)


def looked_at(images: Any, in_memory: bool, skip_unreadable: bool) -> Any:
    """The Images that ``decoded`` reads: all, or of many files on disk some, evenly spaced, and what is empty."""
    count = len(images)
    if count <= SAMPLE or in_memory or skip_unreadable or not isinstance(images.sources[0], Path):
        return images
    rows = np.linspace(0, count - 1, SAMPLE).round().astype(np.int64)
    if isinstance(images.sources, Files):
        rows = np.union1d(rows, np.flatnonzero(images.sources.sizes == 0))
    return images.take(rows)


def looks(
    sources: Sequence[Source] | npt.NDArray[np.uint8],
    masks: Sequence[Path | None] | None,
    view: View,
    title: str,
    extremes: bool = False,
) -> Iterator[Look]:
    """Every image and mask in order, with a progress bar."""
    count = len(sources)
    files = masks or [None] * count
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # a pool takes all that it is given at once, and keeps what is found until it is asked for
        several = (range(i, min(i + 1024, count)) for i in range(0, count, 1024))
        found = (pool.map(lambda i: look(view, sources[i], files[i], extremes), rows) for rows in several)
        yield from track(chain.from_iterable(found), title, total=count, transient=True)


def pixels_of(view: View, source: Source) -> npt.NDArray[np.uint8]:
    """Read and resize one image: (3, size, size).

    Raises:
        PandaError: Naming a file that cannot be read; not all are looked at beforehand.
    """
    try:
        return view(source)
    except ERRORS as error:
        raise PandaError(
            f"{source if isinstance(source, Path) else 'an image'} cannot be read ({_reason(source, error)}): "
            "repair or remove it, or set data.on_error=skip."
        ) from error


ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # all that Pillow raises


def _reason(source: Source, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty file" if isinstance(source, Path) and not source.stat().st_size else "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"{str(error).split(',')[0]}: set data.max_megapixels"
    return str(error).rstrip(".")


def remarks(
    sources: Sequence[Path] | npt.NDArray[np.uint8],
    masks: Sequence[Path | None] | None,
    facts: Sequence[Facts],
    view: View,
) -> tuple[list[str], list[str]]:
    """What is noticed of N images and masks that were looked at: problems, and mere notes, a sentence each."""
    problems: list[str] = []
    notes: list[str] = []
    seen = [i for i, fact in enumerate(facts) if not fact.unreadable]
    masked = [(i, drawn) for i in seen if (drawn := facts[i].drawn) is not None]

    def named(rows: Sequence[int], of_masks: bool) -> str:
        paths = [masks[i] if of_masks and masks else sources[i] for i in rows[:5]]  # arrays have no tag
        names = (relative(path, path.parents[1]) for path in paths if isinstance(path, Path))
        return f" ({', '.join(names)}{', ...' if len(rows) > 5 else ''})"

    def add(sentences: list[str], rows: Sequence[int], sentence: str, of_masks: bool = False) -> None:
        if rows:
            whole = f"{len(masked)} masks" if of_masks else f"{len(seen)} images"
            sentences.append(f"{len(rows)} of {whole} {sentence}{named(rows, of_masks)}")

    brightest = max((facts[i].brightest for i in seen), default=255)
    if brightest < DARK and view.intensity == "auto":
        some = [sources[i] for i in seen[:: math.ceil(len(seen) / 16)]]
        looked = [view.open(source) for source in some]
        low, high = zip(*(image.extremes for image in looked), strict=True)
        least, most = min(low), max(high)
        bits = next((bits for bits in (8, 10, 12, 14) if most < 2**bits), 16)  # as cameras have them
        rule = f"bits:{bits}" if most > 255 and least >= 0 else f"window:{least:g},{most:g}"
        cure = "so save them as PNG, and check again" if looked[0].coarse else f"so set data.intensity={rule}"
        problems.append(
            f"{len(seen)} images have no values above {brightest} of 255, so the network sees them nearly black: "
            f"their values lie between {least:g} and {most:g} (in {len(some)} of them), {cure}."
        )
    add(notes, [i for i in seen if facts[i].turned], "are rotated as their EXIF orientation says")
    if view.crop == "center" and view.before is None and seen:
        boxes = [(*facts[i].size, view.box(facts[i].size)) for i in seen]
        left = [1 - min((x1 - x0) / w, (y1 - y0) / h) for w, h, (x0, y0, x1, y1) in boxes]
        lost = 1 - sum(d.kept * d.area for _, d in masked) / max(1e-12, sum(d.area for _, d in masked))
        share = sum(left) / len(left)
        pixels = f", and {lost:.0%} of the anomalous pixels" if masked and lost >= 0.005 else ""
        if share > 0.25 or pixels:
            what = f"the centre crop leaves out {share:.0%} of the images' longer side{pixels}"
            notes.append(f"{what}; data.crop=squash keeps everything.")
    add(problems, [i for i, d in masked if not d.area], "show no anomalous pixel", True)
    gone = [i for i, d in masked if d.area and not d.visible]
    add(problems, gone, f"lose all anomalous pixels in the crop, or at {view.pixels}", True)
    add(problems, [i for i, d in masked if d.stretched], "do not have the size of their images and are stretched", True)
    large = [i for i, d in masked if d.area > 0.5]
    inverted = len(large) > len(masked) / 2
    word = "cover more than half of their image" + ("; if they are inverted, set data.mask_values" if inverted else "")
    add(problems if inverted else notes, large, word, True)
    return problems, notes


def say(problems: Sequence[str], notes: Sequence[str]) -> None:
    """Say what is noticed: problems as warnings."""
    for sentence in notes:
        rank_zero_info(f"Note: {sentence}")
    for sentence in problems:
        rank_zero_warn(sentence)


def readable_rows(
    sources: Sequence[Path] | npt.NDArray[np.uint8], facts: Sequence[Facts], skip_unreadable: bool
) -> npt.NDArray[np.int64]:
    """Which of N images can be read, as far as they were looked at.

    Raises:
        PandaError: Naming those that cannot, unless they are to be skipped; if none can, in any case.
    """
    bad = [i for i, fact in enumerate(facts) if fact.unreadable]
    if bad:
        names = [f"{sources[i]} ({facts[i].unreadable})" for i in bad]
        listed = "; ".join(names[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
        if not skip_unreadable or len(bad) == len(sources):
            raise PandaError(
                f"{len(bad)} of {len(sources)} images cannot be read: {listed}. Repair or remove them"
                + ("." if skip_unreadable else ", or set data.on_error=skip.")
            )
        rank_zero_warn(f"{len(bad)} of {len(sources)} images cannot be read and are left out: {listed}")
    return np.setdiff1d(np.arange(len(sources)), bad)
