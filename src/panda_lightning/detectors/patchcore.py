"""PatchCore: anomalous pixels by distance to a coreset of normal patches."""

import math

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from panda_lightning.arguments import Amount, Count, Number, Positive, Share
from panda_lightning.detectors.patches import Plan, collected, in_words_of, numbered, planned
from panda_lightning.detectors.segmentation import Level, SegmentationDetector
from panda_lightning.networks.folding import Optimize
from panda_lightning.networks.pyramid import resized
from panda_lightning.pictures.view import MapSize, View
from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import on_device
from panda_lightning.search.coreset import Points, Reduced, everywhere, greedy_coreset
from panda_lightning.search.knn import Backend
from panda_lightning.types import Batch, PandaError


class PatchCore(SegmentationDetector):
    r"""Distance to the nearest patch in a memory of normal patches (Roth et al., CVPR 2022, arXiv 2106.08265).

    .. math:: m(x, p) = \min_{q \in M} \lVert F(x, p) - q \rVert, \qquad
              s(x) = \Bigl(1 - \frac{e^{\lVert F(x, p^*) - q^* \rVert}}{\sum_{q \in N_b(q^*)} e^{\lVert F(x, p^*) - q
              \rVert}}\Bigr) \, m(x, p^*)

    F(x, p) concatenates the levels of the pyramid, each averaged over 3 x 3 patches, at the resolution of the finest
    level. M is a greedy coreset of all normal patches, p* is the patch of x with the largest distance to its nearest
    neighbour q* in M, and N_b(q*) are the b entries of M nearest to q*, including q*. The map is resized to the image
    and smoothed.

    Args:
        backbone: See SegmentationDetector.
        weights: See SegmentationDetector.
        coreset: Share of the normal patches to keep (0.01 to 0.25 in the paper); the first patch is drawn with the data
            module's seed; 1 keeps all.
        neighbours: b; 1 leaves out the weight in front of the score.
        levels: See SegmentationDetector.
        sigma: See SegmentationDetector.
        tile: See SegmentationDetector.
        overlap: See SegmentationDetector.
        half_bank: See SegmentationDetector.
        coreset_gb: Memory for normal patches and the coreset selection, in GiB on each process; None is as much as
            needed. With less memory, a run with one process selects in chunks; the covering radius is then at most 4
            times the smallest possible, instead of twice (search/coreset.py).
        optimize: See DN2.
        index_backend: See DN2.
        index_memory_mb: See DN2.
        map_size: See SegmentationDetector.

    Attributes:
        bank_images: (M,) for each patch of the bank, the row of its normal image.
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
        overlap: Number = 0,
        half_bank: bool = False,
        optimize: Optimize = "folded",
        index_backend: Backend = "auto",
        index_memory_mb: Count = 512,
        map_size: MapSize = "view",
        coreset_gb: Positive | None = None,
    ) -> None:
        super().__init__(
            backbone, weights, levels, sigma, tile, overlap, half_bank, optimize, index_backend, index_memory_mb,
            map_size,
        )  # fmt: skip
        self.coreset = coreset
        self.neighbours = neighbours
        self.coreset_gb = coreset_gb

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
        plan = planned(self)
        if plan.chunks > 1:
            return self._make_reduced(plan)
        patches = Points(plan.dim, plan.dtype, self.device)
        images, counts = collected(self, plan.portion, patches)
        numbers, images, firsts, count = numbered(images, counts)
        size = self._size(count)
        chosen, radius = self._choice(patches, size, count, numbers)
        if size < count:
            rank_zero_info(f"{in_words_of(size, count, plan.dim, radius, radius)}.")
        self.bank_images = images[torch.searchsorted(firsts, chosen, right=True) - 1].cpu()
        return everywhere(patches, numbers, chosen)

    def _make_reduced(self, plan: Plan) -> Tensor:
        """A bank of what a stream in chunks leaves, see Reduced."""
        size, seed = self._size(plan.count), getattr(self.data, "seed", 0)
        reduced = Reduced(size, -(-plan.count // plan.chunks), plan.dim, plan.dtype, self.device, seed)
        images, counts = collected(self, plan.portion, reduced)
        kept, count, patches = reduced.finish(), len(reduced), reduced.kept
        size, squared = min(self._size(count), len(kept)), reduced.squared
        del reduced  # and the last chunk
        rows, radius = self._choice(patches, size, len(kept), None)
        rank_zero_info(f"{in_words_of(size, count, plan.dim, radius, math.sqrt(squared), plan.chunks)}.")
        self.bank_images = images.repeat_interleave(counts)[kept[rows]].cpu()
        return patches.moved(rows)

    def _size(self, count: int) -> int:
        return max(1, round(self.coreset * count))

    def _choice(self, patches: Points, size: int, count: int, numbers: Tensor | None) -> tuple[Tensor, float]:
        """Numbers of the patches chosen from all ``count``, and their covering radius."""
        if size >= count:
            return torch.arange(count, device=patches.device), 0.0
        picks = greedy_coreset(patches, size + 1, getattr(self.data, "seed", 0), numbers)
        found = on_device(self.trainer, picks, f"Coreset of {size} patches", min(size + 1, 100))
        rows, squared = (torch.cat(column) for column in zip(*found, strict=True))
        return rows[:-1], math.sqrt(max(0.0, float(squared[-1])))

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
        if not bool(self._is_whole()[~kept].all()):
            raise PandaError(
                f"PatchCore's coreset={self.coreset:g} was chosen from the patches of all its images, and the "
                "patches that it did not choose are not saved: remove only images that were added later, or "
                "build the bank again."
            )
        super().leave_bank(kept[self.bank_images])
        self.bank_images = (kept.cumsum(0) - 1)[self.bank_images[kept[self.bank_images]]]

    def _is_whole(self) -> Tensor:
        """Of which of its images (N,) the bank is known to have all patches."""
        assert self.bank_images is not None
        size = View.of((self.origin or {})["view"]).sides
        if size is None:  # and how many each has is not kept
            return torch.tensor([self.coreset == 1 or name in self.bank_changes[0] for name in self.bank_names])
        whole = self.embed({"image": torch.zeros(1, 3, *size, dtype=torch.uint8, device=self.device)}).shape[1]  # type: ignore[typeddict-item]
        return torch.bincount(self.bank_images, minlength=len(self.bank_names)).ge(whole)

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
        found = {"score": weight * farthest, "map": resized(distances.view(-1, *self._grid), batch["image"].shape[2:])}
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
