"""What detectors with a bank of normal features share: its index, when it is rebuilt, and the checkpoint."""

from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from panda_lightning.callbacks import RebuildIndex
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.networks.backbones import Optimize
from panda_lightning.runtime.features import gather
from panda_lightning.search.knn import Backend, KNNIndex
from panda_lightning.search.sharded import ShardedIndex
from panda_lightning.types import Scores


class BankDetector(PretrainedDetector):
    """A detector that compares images with a bank of the normal ones' features.

    Checkpoints hold the bank as a plain tensor, so that neither images nor the weights' source are needed again.

    Attributes:
        index: Searches the bank, or what ``fit_index`` makes of it.
        bank: Features of the normal training images, a row each, as the network gives them.
        bank_is_whole: False where it holds this process's images alone: rank, rank + world, ...
        bank_step: ``steps_trained`` when it was made.
    """

    def __init__(
        self,
        backbone: str,
        weights: str | None,
        optimize: Optimize,
        index_backend: Backend,
        index_memory_mb: int,
        shard_bank: bool = False,
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.shard_bank = shard_bank
        self.index = (ShardedIndex if shard_bank else KNNIndex)(index_backend, index_memory_mb)
        self.bank: Tensor | None = None
        self.bank_is_whole = True
        self.bank_step = -1

    @abstractmethod
    def rebuild_bank(self) -> None:
        """Extract the features of all normal training images with the weights of this moment."""

    @abstractmethod
    def fit_index(self) -> int:
        """Make the bank, or what stands for it, searchable on this device; returns how many entries there are."""

    @property
    def bank_is_fresh(self) -> bool:
        """Whether the bank was made with the weights in use."""
        return self.bank is not None and self.bank_step == self.steps_trained

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        return [RebuildIndex(), *super().configure_callbacks()]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["bank"] = self.whole_bank()
        checkpoint["bank_step"] = self.bank_step

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.bank, self.bank_step, self.bank_is_whole = checkpoint["bank"], checkpoint["bank_step"], True

    # ---- a bank in parts -------------------------------------------------------------------------------------------

    def keep_own_part(self) -> None:
        """Keep this process's images alone of a whole bank, as it comes out of a checkpoint, if parts are asked for."""
        if self.bank is not None and self.shard_bank and self.bank_is_whole:
            self.bank = self.bank[self.trainer.global_rank :: self.trainer.world_size].clone()
            self.bank_is_whole = False

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
