"""SPADE: anomalous pixels by correspondence with the most similar normal images."""

from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from panda_lightning.arguments import Amount, Count
from panda_lightning.detectors.segmentation import Level, SegmentationDetector
from panda_lightning.networks.backbones import Optimize, portions
from panda_lightning.networks.pyramid import resized
from panda_lightning.search.knn import Backend
from panda_lightning.types import Batch


class SPADE(SegmentationDetector):
    r"""Sub-image correspondence (Cohen, Hoshen 2020, arXiv 2005.02357), the segmentation of PANDA section 4.5.

    .. math:: s(x) = \frac1k \sum_{i=1}^{k} \lVert f(x) - f_i \rVert, \qquad
              m(x, p) = G_\sigma * \frac1{|L|} \sum_{l \in L} \min_{i \le k, \, q} \lVert F_l(x, p) - F_l(x_i, q) \rVert

    f are pooled features and x_i the k nearest normal images by them; F_l(x, p) is the feature of patch p at level l of
    the network's pyramid, q runs over all patches of the k images, and levels are resized to the image before their
    mean. Distances are Euclidean.

    Args:
        backbone: See SegmentationDetector.
        weights: See SegmentationDetector.
        k: Normal images to compare with (50 in the paper); where there are fewer, all of them.
        levels: See SegmentationDetector.
        sigma: See SegmentationDetector.
        tile: See SegmentationDetector.
        half_bank: See SegmentationDetector.
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.
    """

    SCORING = ("k", "sigma")

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        weights: str | None = None,
        k: Count = 50,
        levels: tuple[Level, ...] = (1, 2, 3),
        sigma: Amount = 4.0,
        tile: Count | None = None,
        half_bank: bool = False,
        optimize: Optimize = "folded",
        index_backend: Backend = "auto",
        index_memory_mb: Count = 512,
    ) -> None:
        super().__init__(backbone, weights, levels, sigma, tile, half_bank, optimize, index_backend, index_memory_mb)
        self.k = k

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        if self.bank is None and self.k > (size := len(data.normal_images)):
            rank_zero_info(f"SPADE compares with all {size} normal images, fewer than k={self.k}.")

    @override
    def embed(self, batch: Batch) -> Tensor:
        """One row an image, (B, D + sum of C h w): its pooled features, then its maps."""
        *maps, pooled = self.pyramid(batch["image"], pooled=True)
        self._shapes = [m.shape[1:] for m in maps]
        return torch.cat([pooled, *(m.flatten(1) for m in maps)], dim=1)

    @override
    def make_bank(self) -> Tensor:
        return self.normal_rows()

    @override
    def fit_index(self) -> int:
        assert self.bank is not None
        self.bank = self.bank.to(self.device)
        return len(self.index.fit(self.bank[:, : self.backbone.num_features]))

    @override
    def score_and_map(self, batch: Batch) -> dict[str, Tensor]:
        rows = self.embed(batch)
        assert self.bank is not None
        k, listed = (min(count, len(self.bank)) for count in (self.k, max(self.k + 1, self.LISTED)))
        squared, nearest = self.index.search(rows[:, : self.backbone.num_features], listed)
        distances, size = squared.sqrt(), batch["image"].shape[-1]
        pairs = zip(portions(rows, 1), portions(nearest[:, :k], 1), strict=True)
        maps = torch.cat([self._maps(some, self.bank[near], size) for some, near in pairs])
        score = distances[:, :k].mean(dim=1)
        return {"score": score, "map": maps, "neighbour": nearest, "distance": distances}

    def _maps(self, rows: Tensor, galleries: Tensor, size: int) -> Tensor:
        """Mean over levels of each patch's distance to the nearest of its image's gallery (B, k, ...) of the bank."""
        start, found = self.backbone.num_features, []
        for channels, height, width in self._shapes:
            end = start + channels * height * width
            queries, patches = (
                r[..., start:end].reshape(*r.shape[:-1], channels, height * width).mT for r in (rows, galleries)
            )
            distances = self.index.nearest_in_each(queries, patches.flatten(1, 2)).sqrt()
            found.append(resized(distances.view(-1, height, width), size))
            start = end
        return torch.stack(found).mean(dim=0)
