"""What detectors with a bank of normal features share: its index, when it is rebuilt, and the checkpoint."""

from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from typing_extensions import override

from panda_lightning.backbones import Optimize
from panda_lightning.callbacks import RebuildIndex
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.knn import Backend, KNNIndex


class BankDetector(PretrainedDetector):
    """A detector that compares images with a bank of the normal ones' features.

    Checkpoints hold the bank as a plain tensor, so that neither images nor the weights' source are needed again.

    Attributes:
        index: Searches the bank, or what ``fit_index`` makes of it.
        bank: Features of the normal training images, a row each, as the network gives them.
        bank_step: ``steps_trained`` when it was made.
    """

    def __init__(
        self, backbone: str, weights: str | None, optimize: Optimize, index_backend: Backend, index_memory_mb: int
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.index = KNNIndex(index_backend, index_memory_mb)
        self.bank: Tensor | None = None
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
        checkpoint["bank"] = None if self.bank is None else self.bank.cpu()
        checkpoint["bank_step"] = self.bank_step

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.bank, self.bank_step = checkpoint["bank"], checkpoint["bank_step"]
