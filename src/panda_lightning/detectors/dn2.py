"""DN2: nearest neighbours in pretrained features."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from panda_lightning.arguments import Count
from panda_lightning.detectors.calibrating import CalibratedByNeighbours
from panda_lightning.detectors.checks import require_enough, require_neighbours
from panda_lightning.detectors.explaining import nearest_images
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.networks.backbones import Pool
from panda_lightning.networks.folding import Optimize
from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import extract
from panda_lightning.search.coreset import kmeans
from panda_lightning.search.knn import Backend, KNNIndex
from panda_lightning.search.sharded import ShardedIndex
from panda_lightning.types import Batch, PandaError


class DN2(CalibratedByNeighbours, PretrainedDetector):
    r"""Distance to the nearest normal images in the feature space of a pretrained network.

    .. math:: s(x) = \sum_{i=1}^{k} \lVert f(x) - f_i \rVert^2, \quad f_i \text{ the k nearest of the bank}

    The bank holds the features of all normal training images. Nothing is trained: ``lightning test`` builds the bank,
    scores the test images and saves ``last.ckpt``. (Bergman, Cohen, Hoshen 2020; "DN2" in PANDA section 3.1.)

    Args:
        backbone: A timm name (``resnet152.tv_in1k``), ``local-dir:PATH``, ``hf-hub:ID``, ``panda_tiny`` (bundled), or a
            checkpoint file of this project.
        weights: A file with weights for the named architecture, instead of timm's.
        k: Neighbours to sum over.
        normalize: L2-normalise features before computing distances; this often helps, especially for blurred or small
            images.
        centroids: Reduce the bank to this many k-means centroids for scoring; None keeps every image. The search is
            then as fast as with a bank of that size, at a small loss of AUROC.
        optimize: How the network is computed: plain, channels_last, folded (BatchNorm of frozen layers folded into
            convolutions) or compiled (torch.compile); each option includes those before it. Scores agree up to float32
            rounding.
        index_backend: torch, faiss, or auto, which is torch.
        index_memory_mb: Memory that one chunk of the search may use, in MiB.
        shard_bank: Each process keeps only its own images' part of the bank and searches it for all processes; for
            banks too large for one device. Scores are the same.
        pool: Features of a token-based network, such as a ViT: token (the class token), avg (the mean of the patch
            tokens) or both (concatenated); None uses the pooling of the network's pretraining.

    Attributes:
        index: Searches the entries.
        bank: Features of the normal training images, one row per image, as the network outputs them.
        bank_is_whole: False if it has only this process's images: rank, rank + world, ...
        reduction: The centroids, and the data they were made from.
    """

    SCORING = ("k", "normalize", "centroids")
    bank = Derived[Any](None)
    bank_is_whole = Derived[bool](True)
    reduction = Derived[tuple[list[Any], Tensor] | None](None)

    def __init__(
        self,
        backbone: str = "resnet152.tv_in1k",
        weights: str | None = None,
        k: Count = 2,
        normalize: bool = False,
        centroids: Count | None = None,
        optimize: Optimize = "folded",
        index_backend: Backend = "auto",
        index_memory_mb: Count = 512,
        shard_bank: bool = False,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.pool = pool
        self.save_hyperparameters()
        self.k, self.normalize = k, normalize
        if centroids is not None and centroids < k:
            raise PandaError(f"centroids={centroids} are fewer than k={k} neighbours: choose {k} or more.")
        if centroids is not None and shard_bank:
            raise PandaError(f"centroids={centroids} reduce all images to one small bank: leave shard_bank out.")
        self.centroids = centroids
        self.shard_bank = shard_bank
        self.index = (ShardedIndex if shard_bank else KNNIndex)(index_backend, index_memory_mb)

    def scoring_space(self, features: Tensor) -> Tensor:
        """Features (N, D) as distances for scores are taken between them."""
        return F.normalize(features, dim=1) if self.normalize else features

    @override
    def anomaly_score(self, batch: Batch) -> Tensor:
        return self.distances_of(self.embed(batch))

    def distances_of(self, features: Tensor) -> Tensor:
        """Sum of the distances of features (B, D) to the k nearest of the bank: (B,)."""
        return self._neighbours(features, self.k)[0].sum(dim=1)

    @override
    def explained(self, batch: Batch) -> dict[str, Tensor]:
        return nearest_images(self, batch)

    def _neighbours(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self.index.search(self.scoring_space(features), count)

    @override
    def accept(self, data: Any) -> None:
        super().accept(data)
        require_neighbours(self, data)

    # ---- the bank ------------------------------------------------------------------------------------------------

    @override
    def drop_bank(self) -> None:
        super().drop_bank()
        self.index = type(self.index)(self.index.backend, self.index.memory_mb)

    @override
    def make_bank(self) -> Tensor:
        """Features (N, D) of the normal training images, as the network gives them."""
        loader: Any = self.data.normal_dataloader()
        require_enough(self.k, len(loader.dataset))  # without those that cannot be read
        self.bank_is_whole = not self.shard_bank
        return extract(self.trainer, self.embed, loader, "Normal features", merged=not self.shard_bank)

    @override
    def fit_index(self) -> int:
        assert self.bank is not None
        if self.shard_bank and self.bank_is_whole:  # as it comes out of a checkpoint
            self.bank, self.bank_is_whole = self.index.own(self.bank).to(self.device), False
        return len(self.index.fit(self.entries()))

    def entries(self) -> Tensor:
        """What distances are taken to, (N, D) in the scoring space: the bank that is here, or its centroids."""
        if not self.reduced:
            return self.scoring_space(self.bank.to(self.device))
        made_from = [self.bank_weights, self.normalize]
        if self.reduction is None or self.reduction[0] != made_from or len(self.reduction[1]) != self.centroids:
            assert self.centroids is not None
            self.reduction = (made_from, kmeans(self.scoring_space(self.bank.cpu()), self.centroids))
        return self.reduction[1].to(self.device)

    @override
    def trace_search(self, index: Any, keep: Callable[[Tensor], Tensor]) -> None:
        self.index = index.fit(keep(self.entries()))

    @property
    def reduced(self) -> bool:
        """Whether the index holds centroids in place of the bank's images."""
        return self.bank is not None and self.centroids is not None and self.centroids < len(self.bank)

    @override
    def whole(self) -> dict[str, Any]:
        parts = self.bank is not None and not self.bank_is_whole
        return super().whole() | ({"bank": self.index.whole(self.bank), "bank_is_whole": True} if parts else {})

    @override
    def all_scored(self) -> None:
        self.index.serve()
