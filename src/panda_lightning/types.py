"""What a batch is, and the error that is meant for the person at the terminal."""

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor


class Batch(TypedDict):
    """Images of one step, the only thing data modules and detectors share.

    Shapes: image (B, 3, H, W) uint8, of one size in a batch, resized but not normalised, or what the frozen layers made
    of it once, (B, C, h, w) or (B, N, C) floating point; label (B,) int64, 1 = anomalous; index (B,) int64, the image's
    place in its data set, or -1 for a repeat that only fills up a distributed batch and counts for nothing; from data
    sets with masks alone, mask (B, H, W) bool, True = anomalous pixel, and has_mask (B,) bool, False for an anomalous
    image whose mask is missing; of loose pictures, unreadable: for each the reason why it could not be read, or "".
    """

    image: Tensor
    label: Tensor
    index: Tensor
    mask: NotRequired[Tensor]
    has_mask: NotRequired[Tensor]
    unreadable: NotRequired[list[str]]


@dataclass(frozen=True)
class Scores:
    """The scores of a whole data set, on the CPU.

    Attributes:
        index: (N,), ascending.
        score: (N,), higher is more anomalous.
        label: (N,), 1 = anomalous.
    """

    index: Tensor
    score: Tensor
    label: Tensor

    @property
    def both(self) -> bool:
        """Whether there are normal and anomalous images, so that AUROC means something."""
        return bool(0 < self.label.sum() < len(self.label))


class PandaError(ValueError):
    """A mistake the user can mend; the command line prints its one sentence without a traceback."""


class UnwritableError(PandaError):
    """A file could not be written, most often for want of room: other runs would fail likewise."""
