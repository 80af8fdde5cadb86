"""DN2: nearest neighbours in pretrained features."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from panda_lightning.backbones import Optimize
from panda_lightning.callbacks import RebuildIndex
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.features import extract, gather
from panda_lightning.knn import Backend, KNNIndex, ShardedIndex
from panda_lightning.types import Batch, PandaError, Scores


class DN2(PretrainedDetector):
    r"""Distance to the nearest normal images in the feature space of a pretrained network.

    .. math:: s(x) = \sum_{i=1}^{k} \lVert f(x) - f_i \rVert^2, \quad f_i \text{ the k nearest of the bank}

    The bank holds the features of all normal training images. Nothing is trained: ``lightning test`` builds the bank,
    scores the test images and saves ``last.ckpt``. (Bergman, Cohen, Hoshen 2020; "DN2" in PANDA section 3.1.)

    Args:
        backbone: A timm name (``resnet152.tv_in1k``), ``local-dir:PATH``, ``hf-hub:ID``, ``panda_tiny`` (bundled), or a
            checkpoint file of this project.
        weights: A file with weights for the named architecture, in place of timm's.
        k: Neighbours to sum over.
        normalize: L2-normalise features before distances are taken; often helps, above all on blurred or small images.
        centroids: Reduce the bank to so many k-means centroids for scoring; None keeps every image. Search is then as
            fast as for a bank of that size, at a small loss of AUROC.
        optimize: How the network is computed, each with what is before it: plain, channels_last, folded (BatchNorm of
            frozen layers folded into convolutions), compiled (torch.compile). Scores agree to float32's rounding.
        index_backend: torch, faiss, or auto: torch on a GPU, faiss on a CPU.
        index_memory_mb: Memory a chunk of the search may take, in MiB.
        shard_bank: Let each process hold its own images' part of the bank and search it for all, for banks too large
            for one device. Scores are the same.
    """

    def __init__(
        self,
        backbone: str = "resnet152.tv_in1k",
        weights: str | None = None,
        k: int = 2,
        normalize: bool = False,
        centroids: int | None = None,
        optimize: Optimize = "folded",
        index_backend: Backend = "auto",
        index_memory_mb: int = 512,
        shard_bank: bool = False,
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.save_hyperparameters()
        if k < 1:
            raise PandaError(f"k={k} is not a number of neighbours: choose 1 or more (2 in the paper).")
        self.k = k
        self.normalize = normalize
        if centroids is not None and centroids < k:
            raise PandaError(f"centroids={centroids} are fewer than k={k} neighbours: choose {k} or more.")
        if centroids is not None and shard_bank:
            raise PandaError(f"centroids={centroids} make one small bank of all images: leave shard_bank out.")
        self.centroids = centroids
        self.shard_bank = shard_bank
        self.index = (ShardedIndex if shard_bank else KNNIndex)(index_backend, index_memory_mb)
        self.bank: Tensor | None = None  # (N, D) float32, as the network gives them; see bank_is_whole
        self.bank_is_whole = True  # or it holds this process's images alone: rank, rank + world, ...
        self.bank_step = -1  # steps_trained when it was made

    def scoring_space(self, features: Tensor) -> Tensor:
        """Features (N, D) as distances for scores are taken between them."""
        return F.normalize(features, dim=1) if self.normalize else features

    @override
    def anomaly_score(self, batch: Batch) -> Tensor:
        distances, _ = self.index.search(self.scoring_space(self.embed(batch)), self.k)
        return distances.sum(dim=1)

    def rebuild_bank(self) -> None:
        """Extract the features of all normal training images with the weights of this moment."""
        loader = self.data.normal_dataloader()
        self.bank = extract(self.trainer, self.embed, loader, "Normal features", merged=not self.shard_bank)
        self.bank_is_whole = not self.shard_bank
        self.bank_step = self.steps_trained

    @property
    def bank_is_fresh(self) -> bool:
        """Whether the bank was made with the weights in use."""
        return self.bank is not None and self.bank_step == self.steps_trained

    def fit_index(self) -> int:
        """Make the bank, or its centroids, searchable on this device; returns how many there are."""
        assert self.bank is not None
        if self.shard_bank and self.bank_is_whole:  # as it comes out of a checkpoint
            self.bank = self.bank[self.trainer.global_rank :: self.trainer.world_size].clone()
            self.bank_is_whole = False
        features = self.scoring_space(self.bank.to(self.device))
        if self.reduced:
            from sklearn.cluster import KMeans  # slow to import

            kmeans = KMeans(self.centroids, n_init=1, random_state=0).fit(features.cpu().numpy())
            features = torch.from_numpy(kmeans.cluster_centers_).to(features)
        return len(self.index.fit(features))

    @property
    def reduced(self) -> bool:
        """Whether the index holds centroids in place of the bank's images."""
        return self.bank is not None and self.centroids is not None and self.centroids < len(self.bank)

    def normal_score(self) -> float:
        """Mean score of the normal training images, none counted as its own neighbour."""
        assert self.bank is not None
        features = self.scoring_space(self.bank.to(self.device))
        if self.reduced:  # a centroid is no image
            return float(self.index.search(features, self.k)[0].sum(dim=1).mean())
        if self.k >= len(self.index):
            raise PandaError(f"k={self.k} neighbours beside the image itself need a bank of {self.k + 1} or more.")
        distances, rows = self.index.search(features, self.k + 1)
        itself = rows == self.bank_rows().to(rows).unsqueeze(1)
        distances = distances.masked_fill(itself, torch.inf).sort(dim=1).values  # copies may hide the image itself
        self.serve()
        return float(self.bank_mean(distances[:, : self.k].sum(dim=1)))

    # ---- a bank in parts -------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Search the part of the bank that is here for other processes, until none has images left to score."""
        if isinstance(self.index, ShardedIndex):
            self.index.serve()

    def bank_rows(self) -> Tensor:
        """The images' numbers in the bank that is here, (N,)."""
        assert self.bank is not None
        if self.bank_is_whole:
            return torch.arange(len(self.bank))
        return torch.arange(len(self.bank)) * self.trainer.world_size + self.trainer.global_rank

    def bank_mean(self, values: Tensor) -> Tensor:
        """Mean over all normal images of a value (N, ...) for each in the bank that is here."""
        if self.bank_is_whole or self.trainer.world_size == 1:
            return values.mean(dim=0)
        total = self.trainer.strategy.reduce(values.sum(dim=0, dtype=torch.float64), reduce_op="sum")
        mean: Tensor = total.to(values) / len(self.index)
        return mean

    def whole_bank(self) -> Tensor | None:
        """The bank of all processes on the CPU, the same on each; every process must call it."""
        if self.bank is None or self.bank_is_whole:
            return None if self.bank is None else self.bank.cpu()
        pieces = [
            tuple(column.cpu() for column in gather([(rows, features)]))
            for rows, features in zip(*(self._rounds(t) for t in (self.bank_rows(), self.bank)), strict=True)
        ]
        _, bank = gather(pieces, merged=False)
        return bank

    def _rounds(self, rows: Tensor, size: int = 4096) -> list[Tensor]:
        """Rows (N, ...) in pieces, as many on every process, so that no device must hold all at once."""
        count = -(-len(self.index) // (size * self.trainer.world_size))
        return [rows[i * size : (i + 1) * size] for i in range(count)]

    @override
    def merged_scores(self) -> Scores:
        if self._merged is None:
            self.serve()
        return super().merged_scores()

    @override
    def on_predict_epoch_end(self) -> None:
        self.serve()

    # ---- the run -------------------------------------------------------------------------------------------

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        return [RebuildIndex(), *super().configure_callbacks()]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.k > (size := len(self.data.normal_images)):
            raise PandaError(f"k={self.k} neighbours, but there are {size} normal training images: choose 1 to {size}.")

    # ---- checkpoints: plain tensors, so that neither images nor the weights' source are needed again -------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["bank"] = self.whole_bank()
        checkpoint["bank_step"] = self.bank_step

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.bank, self.bank_step, self.bank_is_whole = checkpoint["bank"], checkpoint["bank_step"], True
