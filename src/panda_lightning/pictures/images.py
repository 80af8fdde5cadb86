"""The images of a split: where they are, read and resized, and as batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from panda_lightning.pictures.layout import Files, readable, relative
from panda_lightning.pictures.looking import Facts, looked_at, looks, pixels_of, readable_rows, remarks, say
from panda_lightning.pictures.shapes import Pixels, batches, empty, kinds, shapes, stacked, taken
from panda_lightning.pictures.view import View
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.types import Batch, PandaError

GAP = -2  # a row that is none: a batch of one size that is not full; see loaders.ShardedSampler


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
        fingerprints: Those that were made, of what cannot have changed since.
    """

    sources: Sequence[Path] | npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]
    masks: Sequence[Path | None] | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: npt.NDArray[np.int64] | None = None
    fingerprints: dict[tuple[Path, bool], str] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: npt.NDArray[np.int64]) -> "Images":
        """The images of these rows, in their order."""
        sources: Any
        if isinstance(self.sources, np.ndarray) and not isinstance(self.sources, np.memmap):
            sources = self.sources[rows]
        elif isinstance(self.sources, Files):
            sources = self.sources.take(rows)
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
        if isinstance(self.sources, Files):
            return self.sources.names(by)
        rows = range(len(self)) if self.rows is None else self.rows
        pairs = zip(self.sources, rows, strict=True)
        return [by(source) if isinstance(source, Path) else str(row) for source, row in pairs]

    def fingerprint(self, root: Path, times: bool = False) -> str:
        """A short name: of arrays by their pixels; of files by name below ``root`` and size, without opening them.

        Files that were listed together have the sizes and times that they had then.

        Args:
            root: The data set's folder; a copy elsewhere has the same name.
            times: Count also when files, and those of masks, were last changed.
        """
        if (root, times) in self.fingerprints:
            return self.fingerprints[root, times]
        if isinstance(self.sources, np.ndarray) or (len(self) and not isinstance(self.sources[0], Path)):
            found = fingerprint(*map(np.asarray, self.sources))
        else:
            files = self.sources if isinstance(self.sources, Files) else Files.of(self.sources)
            masks = [None if mask is None else (str(mask), mask.stat().st_mtime_ns) for mask in self.masks or ()]
            found = fingerprint(files.pieces(root), [files.times.tolist(), masks] if times else None)
            if files is not self.sources or self.masks is not None:  # looked at now, and the next time again
                return found
        self.fingerprints[root, times] = found
        return found


@dataclass(frozen=True)
class Decoded:
    """Images that can be read.

    Attributes:
        images: They.
        rows: (N,) their places among those that were to be read.
        pixels: (N, 3, H, W) uint8, a list of N (3, H, W) where sizes differ, or None where they are read at every
            access.
        masks: (N, H, W) bool, likewise, or None where there are none, or they are read at every access.
        shapes: (N, 2) heights and widths, where they are known; else the view says them.
    """

    images: Images
    rows: npt.NDArray[np.int64]
    pixels: Pixels | None
    masks: Pixels | None = None
    shapes: npt.NDArray[np.int64] | None = None


def decoded(
    images: Images,
    view: View,
    in_memory: bool,
    skip_unreadable: bool,
    title: str,
    sides: npt.NDArray[np.int64] | None = None,
) -> Decoded:
    """Read images, with a progress bar, and say what is noticed.

    Args:
        images: What to read.
        view: How images are resized.
        in_memory: Keep the pixels. Files are read also where they stay on disk: one that cannot be read is named now,
            not in the night. Of more than 5000 such files, those that are empty and 5000 of all, evenly spaced, are
            read beforehand, unless unreadable ones are to be left out.
        skip_unreadable: Leave out, and count, files that are not images, instead of raising.
        title: What the progress bar says.
        sides: See shapes.shapes, where they are known.

    Raises:
        PandaError: Naming the files that cannot be read.
    """
    count = len(images)
    some = looked_at(images, in_memory, skip_unreadable)
    sides = shapes(images.sources, view) if sides is None else sides
    pixels = empty(sides, (3,), torch.uint8) if in_memory else None
    masks = empty(sides, (), torch.bool) if in_memory and images.masks is not None else None
    files = count > 0 and isinstance(images.sources[0], Path)
    facts: list[Facts] = []
    for i, seen in enumerate(looks(some.sources, some.masks, view, title) if in_memory or files else ()):
        facts.append(seen.facts)
        if pixels is not None and not seen.facts.unreadable:
            pixels[i].numpy()[...] = seen.pixels
            if masks is not None:
                masks[i].numpy()[...] = False if seen.mask is None else seen.mask
    problems, notes = remarks(some.sources, some.masks, facts, view)
    if some is not images:
        hint = "`panda check-data` and data.on_error=skip check all of them"
        notes.append(f"{len(some)} of {count} images are checked beforehand; {hint}.")
    say(problems, notes)
    good = readable_rows(some.sources, facts, skip_unreadable)
    if some is not images:
        return Decoded(images, np.arange(count), None, None, sides)
    if len(good) == count:
        return Decoded(images, good, pixels, masks, sides)
    return Decoded(images.take(good), good, taken(pixels, good), taken(masks, good), sides[good])


class ImageDataset(Dataset[Batch]):
    """Resized uint8 images with label and index.

    Args:
        found: What to show.
        label: Of all images that were to be read: True or 1 where anomalous, or class numbers.
        view: How images are resized.

    Attributes:
        kinds: (N,) numbers of the images' sizes; None where all have one, which every batch must have.
        hidden: What the frozen layers of a run's network made of the images, (N, ...), which batches then show in their
            place; None shows images.
    """

    hidden: Tensor | None = None

    def __init__(self, found: Decoded, label: npt.NDArray[np.bool_] | npt.NDArray[np.int64], view: View) -> None:
        self.view = view
        self.images = found.images
        self.shapes = shapes(self.images.sources, view) if found.shapes is None else found.shapes
        self.kinds = kinds(self.shapes)
        self.pixels, self.masks = found.pixels, found.masks
        self.label = torch.from_numpy(label[found.rows].astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A whole batch at once.

        Row -1 is a filler with index -1, shown as image 0, if there is one, or where sizes differ as the first image of
        the batch; row GAP is left out.
        """
        rows = [row for row in rows if row != GAP]
        index = torch.tensor(rows)
        if not len(self):
            image = torch.zeros(len(rows), 3, *self.view.usual, dtype=torch.uint8)
            return {"image": image, "label": torch.zeros_like(index), "index": index}
        first = 0 if self.kinds is None else next((row for row in rows if row >= 0), 0)
        real = torch.where(index < 0, first, index)
        if self.hidden is None:
            image = self.pictures(real)
        elif list(rows) == list(range(rows[0], rows[0] + len(rows))) and rows[0] >= 0:
            image = self.hidden[rows[0] : rows[0] + len(rows)]  # in order, as for the bank: no copy
        else:
            image = self.hidden[real.to(self.hidden.device, non_blocking=True)]
        batch: Batch = {"image": image, "label": self.label[real], "index": index}
        if self.images.masks is not None:
            batch["mask"] = self._masks(self.images.masks, real)
            drawn = torch.tensor([self.images.masks[i] is not None for i in real])
            batch["has_mask"] = drawn | (batch["label"] == 0)
        return batch

    def batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Batch]]:
        """Rows (B,) with what batches show of them, those of one size together."""
        for some in batches(rows, self.kinds, max(1, len(rows))):
            yield some, self.__getitems__(some.tolist())

    def _masks(self, files: Sequence[Path | None], rows: Tensor) -> Tensor:
        if self.masks is not None:
            return stacked(self.masks, rows)
        found = torch.zeros(len(rows), *self.shapes[rows[0]].tolist(), dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            if (file := files[row]) is not None:
                found.numpy()[place] = self.view.mask(file, self.images.sources[row])
        return found

    def pictures(self, rows: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 of these rows (B,), whatever batches show.

        Raises:
            PandaError: If they have several sizes.
        """
        if self.kinds is not None and len(rows) and bool((self.kinds[rows] != self.kinds[rows[0]]).any()):
            raise PandaError(
                "a batch has images of different sizes: with crop=none use the data module's own loaders and samplers."
            )
        if self.pixels is not None:
            return stacked(self.pixels, rows)
        return torch.from_numpy(np.stack([pixels_of(self.view, self.images.sources[i]) for i in rows]))


def as_is(batch: Any) -> Any:
    """Collate nothing: ``ImageDataset`` gives whole batches."""
    return batch
