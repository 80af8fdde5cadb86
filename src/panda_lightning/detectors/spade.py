"""SPADE: anomalous pixels by correspondence with the most similar normal images."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from panda_lightning.arguments import Amount, Count, Number
from panda_lightning.detectors.segmentation import Level, SegmentationDetector
from panda_lightning.networks.backbones import portions
from panda_lightning.networks.folding import Optimize
from panda_lightning.networks.pyramid import resized
from panda_lightning.pictures.view import MapSize
from panda_lightning.search.knn import Backend, KNNIndex
from panda_lightning.types import Batch, PandaError


class SPADE(SegmentationDetector):
    r"""Sub-image correspondence (Cohen, Hoshen 2020, arXiv 2005.02357), the segmentation of PANDA section 4.5.

    .. math:: s(x) = \frac1k \sum_{i=1}^{k} \lVert f(x) - f_i \rVert, \qquad
              m(x, p) = G_\sigma * \frac1{|L|} \sum_{l \in L} \min_{i \le k, \, q} \lVert F_l(x, p) - F_l(x_i, q) \rVert

    f are pooled features, and x_i are the k normal images nearest to x in them. F_l(x, p) is the feature of patch p at
    level l of the network's pyramid, and q runs over all patches of the k images. The maps of the levels are resized to
    the image before they are averaged. Distances are Euclidean.

    Args:
        backbone: See SegmentationDetector.
        weights: See SegmentationDetector.
        k: Normal images to compare with (50 in the paper); if there are fewer, all of them.
        levels: See SegmentationDetector.
        sigma: See SegmentationDetector.
        tile: See SegmentationDetector.
        overlap: See SegmentationDetector.
        half_bank: See SegmentationDetector.
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.
        map_size: See SegmentationDetector.
    """

    SCORING = ("k", "sigma")
    SHAPES = "one"

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        weights: str | None = None,
        k: Count = 50,
        levels: tuple[Level, ...] = (1, 2, 3),
        sigma: Amount = 4.0,
        tile: Count | None = None,
        overlap: Number = 0,
        half_bank: bool = False,
        optimize: Optimize = "folded",
        index_backend: Backend = "auto",
        index_memory_mb: Count = 512,
        map_size: MapSize = "view",
    ) -> None:
        super().__init__(
            backbone, weights, levels, sigma, tile, overlap, half_bank, optimize, index_backend, index_memory_mb,
            map_size,
        )  # fmt: skip
        self.k = k
        self._patches: list[KNNIndex] | None = None

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        if self.bank is None and self.k > (size := len(data.normal_images)):
            rank_zero_info(f"SPADE compares with all {size} normal images, because there are fewer than k={self.k}.")

    @override
    def embed(self, batch: Batch) -> Tensor:
        """One row an image, (B, D + sum of h w C): its pooled features, then its maps patch by patch."""
        *maps, pooled = self.pyramid(batch["image"], pooled=True)
        self._shapes = [m.shape[1:] for m in maps]
        return torch.cat([pooled, *(m.flatten(2).mT.flatten(1) for m in maps)], dim=1)

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["format"] < 3:  # whose maps are channel by channel
            raise PandaError(
                f"the checkpoint has format {state['format']}, in which SPADE's bank has another order: make it "
                "again, or use the version that wrote it."
            )
        super().set_extra_state(state)

    @override
    def make_bank(self) -> Tensor:
        return self.normal_rows()

    @override
    def drop_bank(self) -> None:
        super().drop_bank()
        self._patches = None

    @override
    def fit_index(self) -> int:
        assert self.bank is not None
        self.bank, self._patches = self.bank.to(self.device), None
        return len(self.index.fit(self.bank[:, : self.backbone.num_features]))

    @override
    def score_and_map(self, batch: Batch) -> dict[str, Tensor]:
        rows = self.embed(batch)
        assert self.bank is not None
        k, listed = (min(count, len(self.bank)) for count in (self.k, max(self.k + 1, self.LISTED)))
        squared, nearest = self.index.search(rows[:, : self.backbone.num_features], listed)
        distances, size = squared.sqrt(), batch["image"].shape[2:]
        if self._patches is None:  # whose shapes are known by now
            self._patches = [self.index.empty().fit(level) for level in self._levels(self.bank)]
        pairs = zip(portions(rows, 1), portions(nearest[:, :k], 1), strict=True)
        maps = torch.cat([self._maps(some, near, size) for some, near in pairs])
        score = distances[:, :k].mean(dim=1)
        return {"score": score, "map": maps, "neighbour": nearest, "distance": distances}

    def _levels(self, rows: Tensor) -> list[Tensor]:
        """The patches of each level, (B, h w, C), of what ``embed`` gives."""
        sizes = [self.backbone.num_features, *(math.prod(shape) for shape in self._shapes)]
        _, *levels = torch.split(rows, sizes, dim=1)
        return [level.view(level.shape[0], -1, shape[0]) for level, shape in zip(levels, self._shapes, strict=True)]

    def _maps(self, rows: Tensor, nearest: Tensor, size: Sequence[int]) -> Tensor:
        """Mean over levels of each patch's distance to the nearest of the patches of some images (B, k) of the bank."""
        assert self._patches is not None
        levels = zip(self._patches, self._levels(rows), self._shapes, strict=True)
        found = [
            resized(index.nearest_in_each(patches, nearest).sqrt().view(-1, *shape[1:]), size)
            for index, patches, shape in levels
        ]
        return torch.stack(found).mean(dim=0)
