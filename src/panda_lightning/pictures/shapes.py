"""Images of several sizes: which of them have one, and batches whose images do."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from panda_lightning.pictures.pixels import Source, frame
from panda_lightning.pictures.view import View

Pixels = Tensor | list[Tensor]  # of images of one size, or of several
MANY = 2000  # headers whose reading takes long enough for a progress bar


def shapes(sources: Sequence[Source] | npt.NDArray[np.uint8], view: View) -> npt.NDArray[np.int64]:
    """Heights and widths (N, 2) of what a view makes of images; of one that cannot be read, a square.

    Files tell their sizes in their headers, which are read only where the view asks for sizes.
    """
    if view.sides is not None:
        return np.broadcast_to(np.array(view.sides, dtype=np.int64), (len(sources), 2))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda i: _shape(sources[i], view), range(len(sources)))
        shown = track(found, "Sizes of images", total=len(sources), transient=True, disable=len(sources) < MANY)
        return np.array(list(shown), dtype=np.int64).reshape(-1, 2)


def _shape(source: Source, view: View) -> tuple[int, int]:
    try:
        known = isinstance(source, np.ndarray)
        size: Any = source.shape[1::-1] if known else frame(source, view.max_megapixels).size  # type: ignore[union-attr]
        return view.shape((size[0], size[1]))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # said where its pixels are read
        return view.usual


def kinds(shapes: npt.NDArray[np.int64]) -> Tensor | None:
    """A number (N,) for the size (N, 2) of each image; None where all have one size."""
    if bool((shapes == shapes[:1]).all()):
        return None
    return torch.from_numpy(np.unique(shapes, axis=0, return_inverse=True)[1].reshape(-1))


def batches(rows: Tensor, kinds: Tensor | None, most: int) -> list[Tensor]:
    """Rows (N,) in batches of at most ``most`` images of one size, in their order within a size."""
    if kinds is None or not len(rows):
        return list(torch.split(rows, most))
    number = kinds[rows]
    order = number.argsort(stable=True)
    counts = torch.unique_consecutive(number[order], return_counts=True)[1]
    return [part for alike in torch.split(rows[order], counts.tolist()) for part in torch.split(alike, most)]


def empty(sides: npt.NDArray[np.int64], channels: tuple[int, ...], dtype: torch.dtype) -> Pixels:
    """Room for images of these heights and widths (N, 2)."""
    if kinds(sides) is None:
        return torch.empty((len(sides), *channels, *(sides[0].tolist() if len(sides) else (0, 0))), dtype=dtype)
    return [torch.empty((*channels, *shape), dtype=dtype) for shape in sides.tolist()]


def taken(pixels: Pixels | None, rows: npt.NDArray[np.int64] | Tensor) -> Any:
    """Images of these rows, if there are any, as they are kept."""
    return [pixels[i] for i in rows] if isinstance(pixels, list) else None if pixels is None else pixels[rows]


def stacked(pixels: Pixels, rows: Tensor) -> Tensor:
    """Images of these rows, which have one size, as one tensor."""
    return torch.stack([pixels[i] for i in rows]) if isinstance(pixels, list) else pixels[rows]
