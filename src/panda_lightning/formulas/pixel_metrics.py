"""AUROC, PRO, AP and F1 of pixels, from raw scores and in bounded memory."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelMetrics:
    """How well anomaly maps find anomalous pixels; all but ``threshold`` are fractions in [0, 1].

    Attributes:
        auroc: Over all pixels.
        auroc_error: Bound on its error; see PixelHistogram.
        pro: Per-region overlap, integrated over false positive rates up to PixelHistogram.LIMIT.
        ap: Average precision over all pixels.
        f1: Best F1 over all thresholds: oracle.
        threshold: Where the best F1 is reached, in the maps' unit: oracle.
    """

    auroc: float
    auroc_error: float
    pro: float
    ap: float
    f1: float
    threshold: float


class PixelHistogram:
    r"""Counts pixels by score, image after image, in 96 MiB however many there are.

    The bins are the leading 22 bits of the score as a float32 number, so scores may have any range, and a bin is
    1.2e-4 of its score wide. Only pairs of pixels within a bin have lost their order: AUROC counts them half, and is
    exact to half of their share of all pairs, which is reported with it. (Pixels of score -inf are truly equal.)

    The overlap of a region (8-connected pixels of a mask) at a threshold is the share of its pixels at or above it, so
    that the mean over regions is a histogram too, in which a pixel of region r weighs 1 / \|r\|. (PRO as of Bergmann
    et al., CVPR 2019.)

    Attributes:
        counts: (3, bins) float64: normal pixels, anomalous pixels, anomalous pixels by 1 / size of their region.
            Those of several processes add up.
    """

    BITS = 22
    LIMIT = 0.3  # of the false positive rate in PRO

    def __init__(self) -> None:
        self.counts = torch.zeros(3, 1 << self.BITS, dtype=torch.float64)

    def add(self, maps: Tensor, masks: Tensor) -> None:
        """Count the pixels of some images.

        Args:
            maps: (B, H, W), higher is more anomalous; finite, or -inf for pixels that were not seen, which are equal.
            masks: (B, H, W) bool, True = anomalous.
        """
        from scipy.ndimage import label

        bins, masks = self._bins(maps.detach().float().cpu()), masks.cpu()
        weight = torch.zeros(masks.shape, dtype=torch.float64)
        for i in masks.any(dim=(1, 2)).nonzero()[:, 0]:
            regions, _ = label(masks[i].numpy(), structure=np.ones((3, 3)))
            region = torch.from_numpy(regions).long()
            weight[i] = (1 / torch.bincount(region.flatten()).double())[region]
        one = torch.ones((), dtype=torch.float64)
        for counts, chosen, value in zip(self.counts, (~masks, masks, masks), (one, one, weight[masks]), strict=True):
            counts.index_add_(0, bins[chosen], value.expand(int(chosen.sum())))

    def _bins(self, scores: Tensor) -> Tensor:
        bits = scores.contiguous().view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of the numbers
        return (ordered >> (32 - self.BITS)).long() + (1 << self.BITS - 1)

    def _lower_edge(self, number: int) -> float:
        ordered = torch.tensor((number - (1 << self.BITS - 1)) << (32 - self.BITS), dtype=torch.int32)
        return float(torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32))

    def metrics(self) -> PixelMetrics | None:
        """What the counts give; None if there are no normal or no anomalous pixels."""
        used = self.counts[:2].sum(dim=0).nonzero()[:, 0].flip(0)  # highest scores first
        normal, anomalous, overlap = self.counts[:, used]
        if not normal.sum() or not anomalous.sum():
            return None
        false, true, pro = (column.cumsum(0) / column.sum() for column in (normal, anomalous, overlap))
        precision = anomalous.cumsum(0) / (normal + anomalous).cumsum(0)
        share = anomalous / anomalous.sum()
        f1 = 2 * precision * true / (precision + true).clamp(min=1e-300)
        best = int(f1.argmax())
        seen = used != self._bins(torch.tensor(-torch.inf))
        ties = float((share * normal)[seen].sum() / normal.sum())
        return PixelMetrics(
            auroc=float(_area(false, true, 1.0)),
            auroc_error=ties / 2,
            pro=float(_area(false, pro, self.LIMIT)) / self.LIMIT,
            ap=float((share * precision).sum()),
            f1=float(f1[best]),
            threshold=self._lower_edge(int(used[best])),
        )


def _area(x: Tensor, y: Tensor, limit: float) -> Tensor:
    """Area under straight lines from (0, 0) through the points (N,), x ascending to 1, up to x = limit, at most 1."""
    x, y = (torch.cat([column.new_zeros(1), column]) for column in (x, y))
    i = int(torch.searchsorted(x, limit))  # the first point there or beyond
    at = torch.lerp(y[i - 1], y[i], (limit - x[i - 1]) / (x[i] - x[i - 1]))
    return torch.trapezoid(torch.cat([y[:i], at.view(1)]), torch.cat([x[:i], x.new_tensor([limit])]))
