"""PatchCore: anomalous pixels by distance to a coreset of normal patches."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from panda_lightning.arguments import Amount, Count, Share
from panda_lightning.detectors.segmentation import Level, SegmentationDetector
from panda_lightning.networks.backbones import Optimize
from panda_lightning.networks.pyramid import resized
from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import on_device
from panda_lightning.search.coreset import greedy_coreset
from panda_lightning.search.knn import Backend
from panda_lightning.types import Batch, PandaError


class PatchCore(SegmentationDetector):
    r"""Distance to the nearest of a memory of normal patches (Roth et al., CVPR 2022, arXiv 2106.08265).

    .. math:: m(x, p) = \min_{q \in M} \lVert F(x, p) - q \rVert, \qquad
              s(x) = \Bigl(1 - \frac{e^{\lVert F(x, p^*) - q^* \rVert}}{\sum_{q \in N_b(q^*)} e^{\lVert F(x, p^*) - q
              \rVert}}\Bigr) \, m(x, p^*)

    F(x, p) joins the levels of the pyramid, each averaged over 3 x 3 patches, at the finest one's resolution; M is a
    greedy coreset of all normal patches; p* is the patch farthest from its nearest q* in M, N_b(q*) the b entries of
    M nearest to q*, itself among them. The map is resized to the image and smoothed.

    Args:
        backbone: See SegmentationDetector.
        weights: See SegmentationDetector.
        coreset: Share of the normal patches to keep (0.01 to 0.25 in the paper), begun with one that the data's seed
            draws; 1 keeps all.
        neighbours: b; 1 leaves the score as it is, without its weight.
        levels: See SegmentationDetector.
        sigma: See SegmentationDetector.
        tile: See SegmentationDetector.
        half_bank: See SegmentationDetector.
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.

    Attributes:
        bank_images: (M,) rows of the normal images that the bank's patches are of.
    """

    SCORING = ("neighbours", "sigma")
    bank_images = Derived[Tensor | None](None)

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        weights: str | None = None,
        coreset: Share = 0.1,
        neighbours: Count = 9,
        levels: tuple[Level, ...] = (2, 3),
        sigma: Amount = 4.0,
        tile: Count | None = None,
        half_bank: bool = False,
        optimize: Optimize = "folded",
        index_backend: Backend = "auto",
        index_memory_mb: Count = 512,
    ) -> None:
        super().__init__(backbone, weights, levels, sigma, tile, half_bank, optimize, index_backend, index_memory_mb)
        self.coreset = coreset
        self.neighbours = neighbours

    @override
    def embed(self, batch: Batch) -> Tensor:
        """The patches of each image, (B, h w, C)."""
        pyramid = self.pyramid(batch["image"])
        self._grid = max(m.shape[2:] for m in pyramid)
        averaged = (F.avg_pool2d(m, 3, stride=1, padding=1, count_include_pad=False) for m in pyramid)
        joined = [F.interpolate(m, size=self._grid, mode="bilinear", align_corners=False) for m in averaged]
        return torch.cat(joined, dim=1).flatten(2).mT

    @override
    def make_bank(self) -> Tensor:
        of_each = self.normal_rows()
        images = torch.arange(len(of_each)).repeat_interleave(of_each.shape[1])
        patches = of_each.flatten(0, 1)
        size = max(1, round(self.coreset * len(patches)))
        if size < len(patches):
            chosen: list[Tensor] = []
            if self.trainer.is_global_zero:
                picks = greedy_coreset(patches, size, getattr(self.data, "seed", 0))
                picks = on_device(self.trainer, picks, f"Coreset of {size} patches", min(size, 100))
                chosen = [rows.cpu() for rows in picks]  # a tensor in an object would come out on process 0's GPU
            rows = torch.cat(self.trainer.strategy.broadcast(chosen))
            patches, images = patches[rows.to(patches.device)], images[rows]
        self.bank_images = images
        return patches

    @override
    def join_bank(self, rows: Tensor) -> None:
        assert self.bank_images is not None
        first = len(self.bank_names)
        super().join_bank(rows.flatten(0, 1))
        images = torch.arange(first, first + len(rows)).repeat_interleave(rows.shape[1])
        self.bank_images = torch.cat([self.bank_images, images])

    @override
    def leave_bank(self, kept: Tensor) -> None:
        assert self.bank_images is not None
        patches = torch.bincount(self.bank_images, minlength=len(kept))
        side = (self.origin or {})["view"]["image_size"]
        whole = self.embed({"image": torch.zeros(1, 3, side, side, dtype=torch.uint8)}).shape[1]  # type: ignore[typeddict-item]
        if bool((patches[~kept] < whole).any()):
            raise PandaError(
                f"PatchCore's coreset={self.coreset:g} was chosen among the patches of all its images, and what others "
                "had in place of one that goes is not kept: take out images that were added, or build it anew."
            )
        super().leave_bank(kept[self.bank_images])
        self.bank_images = (kept.cumsum(0) - 1)[self.bank_images[kept[self.bank_images]]]

    @override
    def fit_index(self) -> int:
        assert self.bank is not None
        self.bank = self.bank.to(self.device)
        return len(self.index.fit(self.bank))

    @override
    def score_and_map(self, batch: Batch) -> dict[str, Tensor]:
        patches = self.embed(batch)
        squared, nearest = self.index.search(patches.flatten(0, 1), 1)
        assert self.bank is not None
        distances, nearest = (t.view(patches.shape[:2]) for t in (squared.sqrt(), nearest))
        farthest, place = distances.max(dim=1)
        image = torch.arange(patches.shape[0], device=place.device)
        patch, entry = patches[image, place], self.bank[nearest[image, place]]
        _, around = self.index.search(entry, min(self.neighbours, len(self.bank)))
        gaps = torch.linalg.vector_norm(self.bank[around].float() - patch.unsqueeze(1), dim=2)
        weight = 1 - torch.exp(farthest - gaps.logsumexp(dim=1)) if gaps.shape[1] > 1 else 1.0
        found = {"score": weight * farthest, "map": resized(distances.view(-1, *self._grid), batch["image"].shape[-1])}
        return {**found, "patch": patch}

    @override
    def explained(self, batch: Batch) -> dict[str, Tensor]:
        found = self.outputs(batch)
        patch = found.pop("patch")
        return found if self.bank_images is None else {**found, **self._nearest_images(patch)}

    def _nearest_images(self, patch: Tensor) -> dict[str, Tensor]:
        """The normal images with the patches nearest to these (B, C), and the distances to them."""
        assert self.bank is not None
        assert self.bank_images is not None
        images, count = self.bank_images.numpy(), len(self.bank)
        listed = min(self.LISTED, len(np.unique(images)))
        found, wanted = [], min(16 * listed, count)
        for one in torch.split(patch, 1):
            while True:  # until the nearest patches are of enough images
                squared, rows = self.index.search(one, wanted)
                near = images[rows[0].cpu().numpy()]
                first = np.sort(np.unique(near, return_index=True)[1])[:listed]  # the nearest patch of each image
                if len(first) == listed:
                    break
                wanted = min(4 * wanted, count)
            found.append((torch.from_numpy(near[first]), squared[0].sqrt()[first]))
        neighbour, distance = (torch.stack(column) for column in zip(*found, strict=True))
        return {"neighbour": neighbour.to(patch.device), "distance": distance}
