"""Images of a data set: where they are, how they are resized, and as a torch Dataset."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from pytorch_lightning.utilities import rank_zero_warn
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.types import Batch, PandaError


@dataclass(frozen=True)
class Images:
    """One split of a data set, before any protocol.

    Attributes:
        sources: N files, or an array (N, H, W) or (N, H, W, 3) uint8.
        targets: (N,) class numbers.
        masks: N files of masks, None for an image without anomalous pixels; or None where there are no masks.
        problems: What is wrong with the files but does not prevent their use, a sentence each.
        rows: (N,) places in the whole split, where these are some of it.
    """

    sources: Sequence[Path] | npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]
    masks: Sequence[Path | None] | None = None
    problems: tuple[str, ...] = ()
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
        return Images(sources, self.targets[rows], masks, self.problems, rows if self.rows is None else self.rows[rows])

    def names(self, root: Path) -> list[str]:
        """What they are called: their files relative to ``root``, or their row numbers in the split."""
        rows = range(len(self)) if self.rows is None else self.rows
        pairs = zip(self.sources, rows, strict=True)
        return [relative(source, root) if isinstance(source, Path) else str(row) for source, row in pairs]

    def fingerprint(self, root: Path, times: bool = False) -> str:
        """A short name: of arrays by their pixels; of files by name below ``root`` and size, without opening them.

        Args:
            root: The data set's folder; a copy elsewhere has the same name.
            times: Count also when files were last changed.
        """
        if isinstance(self.sources, np.ndarray) or not isinstance(self.sources[0], Path):
            return fingerprint(*(torch.from_numpy(np.ascontiguousarray(source)) for source in self.sources))
        stats = [os.stat(path) for path in self.sources]
        files = [(relative(p, root), s.st_size) for p, s in zip(self.sources, stats, strict=True)]
        return fingerprint(files, [s.st_mtime_ns for s in stats] if times else None)

    def with_masks(self, masks: Sequence[Path | None]) -> "Images":
        """The images with their masks; without any, and with a problem, where a file of a mask is missing."""
        missing = [str(m) for m in masks if m is not None and not m.is_file()]
        if not missing:
            return replace(self, masks=masks)
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        problem = f"{len(missing)} masks are missing, so only the images' labels are used: {listed}"
        return replace(self, problems=(*self.problems, problem))


def relative(path: Path, root: Path) -> str:
    """A file's name below the data set's folder, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()


@dataclass(frozen=True)
class View:
    """How an image becomes (3, size, size) uint8.

    Attributes:
        size: Side in pixels.
        crop: center resizes the shorter side to ``resize`` and cuts the middle; squash resizes straight to a square.
        resize: See crop.
        interpolation: bilinear or bicubic.
        before: What a data set does to image and mask first, given the picture and how to resample it.
    """

    size: int
    crop: Literal["center", "squash"]
    resize: int
    interpolation: str
    before: Callable[[Image.Image, Image.Resampling], Image.Image] | None = None

    @property
    def words(self) -> dict[str, Any]:
        """What checkpoints keep of it, by the names of the data module's arguments; ``resize`` only where it counts."""
        return {
            "image_size": self.size,
            "crop": self.crop,
            "resize": self.resize if self.crop == "center" else None,
            "interpolation": self.interpolation,
            "before": self.before and self.before.__name__,
        }

    def __call__(self, source: Path | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Read and resize one image: (3, size, size)."""
        image = self._fit(read_rgb(source), Image.Resampling[self.interpolation.upper()])
        return np.asarray(image).transpose(2, 0, 1)

    def mask(self, source: Path | None) -> npt.NDArray[np.bool_]:
        """Read and resize one mask, above half grey being anomalous: (size, size); None is all normal."""
        if source is None:
            return np.zeros((self.size, self.size), dtype=np.bool_)
        mask = Image.open(source).convert("L").point(lambda grey: 255 * (grey > 127))
        return np.asarray(self._fit(mask, Image.Resampling.NEAREST)) > 0

    def _fit(self, image: Image.Image, how: Image.Resampling) -> Image.Image:
        if self.before is not None:
            image = self.before(image, how)
        if self.crop == "squash":
            return image.resize((self.size, self.size), how)
        scale = self.resize / min(image.size)
        width, height = (max(self.resize, round(side * scale)) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.resize((width, height), how).crop((left, top, left + self.size, top + self.size))


def read_rgb(source: Path | npt.NDArray[np.uint8]) -> Image.Image:
    """An RGB image: grey is repeated, an alpha channel dropped, 16 bits scaled to 8."""
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@dataclass(frozen=True)
class Decoded:
    """Images that can be read.

    Attributes:
        images: They.
        rows: (N,) their places among those that were to be read.
        pixels: (N, 3, size, size) uint8, or None where they are read at every access.
    """

    images: Images
    rows: npt.NDArray[np.int64]
    pixels: Tensor | None


def decoded(images: Images, view: View, in_memory: bool, skip_unreadable: bool, title: str) -> Decoded:
    """Read images, with a progress bar.

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
    pixels = torch.empty((len(images), 3, view.size, view.size), dtype=torch.uint8) if in_memory else None
    bad: dict[int, str] = {}
    files = len(images) > 0 and isinstance(images.sources[0], Path)
    rows = range(len(images) if in_memory or files else 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda i: decode(view, images.sources[i]), rows)
        for i, image in track(zip(rows, found, strict=True), title, total=len(rows), transient=True):
            if isinstance(image, str):
                bad[i] = image
            elif pixels is not None:
                pixels.numpy()[i] = image
    if not bad:
        return Decoded(images, np.arange(len(images)), pixels)
    names = [f"{images.sources[i]} ({reason})" for i, reason in bad.items()]
    listed = "; ".join(names[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
    if not skip_unreadable or len(bad) == len(images):
        raise PandaError(
            f"{len(bad)} of {len(images)} images cannot be read: {listed}. Mend or remove them, or set "
            "data.on_error=skip."
        )
    rank_zero_warn(f"{len(bad)} of {len(images)} images cannot be read and are left out: {listed}")
    good = np.array([i for i in rows if i not in bad])
    return Decoded(images.take(good), good, None if pixels is None else pixels[good])


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
        self.pixels = found.pixels
        self.label = torch.from_numpy(label[found.rows].astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A whole batch at once; row -1 is a filler, shown as image 0 with index -1."""
        index = torch.tensor(rows)
        real = index.clamp(min=0)
        if self.hidden is None:
            image = self.pictures(real)
        elif list(rows) == list(range(rows[0], rows[0] + len(rows))) and rows[0] >= 0:
            image = self.hidden[rows[0] : rows[0] + len(rows)]  # in order, as for the bank: no copy
        else:
            image = self.hidden[real]
        batch: Batch = {"image": image, "label": self.label[real], "index": index}
        if self.images.masks is not None:
            batch["mask"] = torch.from_numpy(np.stack([self.view.mask(self.images.masks[i]) for i in real]))
        return batch

    def pictures(self, rows: Tensor) -> Tensor:
        """Images (B, 3, size, size) uint8 of these rows (B,), whatever batches show."""
        if self.pixels is not None:
            return self.pixels[rows]
        return torch.from_numpy(np.stack([self.view(self.images.sources[i]) for i in rows]))


def as_is(batch: Any) -> Any:
    """Collate nothing: ``ImageDataset`` gives whole batches."""
    return batch


def decode(view: View, source: Path | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | str:
    """The image (3, size, size), or why it cannot be read."""
    try:
        return view(source)
    except UnidentifiedImageError:
        return "empty file" if isinstance(source, Path) and not source.stat().st_size else "not an image"
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # all that Pillow raises
        return str(error)
