"""What every detector shares: scoring in validation, test and prediction, and the callbacks that look at it."""

import math
from abc import ABC, abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from panda_lightning import metrics
from panda_lightning.callbacks import Health, Media, Report
from panda_lightning.checkpoints import WholeCheckpointIO
from panda_lightning.features import gather
from panda_lightning.loggers import AutoWandbLogger
from panda_lightning.types import Batch, PandaError, Scores


class Detector(pl.LightningModule, ABC):
    """Scores images by how anomalous they are.

    A method overrides ``anomaly_score`` and, if it learns, ``training_step`` and ``configure_optimizers``.

    Attributes:
        COMPUTING: Arguments that say how to compute, not what: they may differ from the checkpoint's.
        scores: Scores of the last whole validation or test, equal on every process.
        steps_trained: Optimiser steps behind the weights in use.
    """

    COMPUTING = ("optimize", "index_backend", "index_memory_mb", "prefix_cache_gb", "prefix_cache_dir")
    scores: Scores | None = None
    steps_trained: int = 0
    _steps_per_epoch: int = 1

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[tuple[Tensor, ...]] = []
        self._merged: Scores | None = None

    @abstractmethod
    def anomaly_score(self, batch: Batch) -> Tensor:
        """Score images: (B,), higher is more anomalous."""

    @property
    def method(self) -> str:
        """Short name of the method, for the results' tables and W&B's job type."""
        return type(self).__name__

    @property
    def data(self) -> Any:
        """The data module of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # the Trainer sets it while it runs

    @property
    def epochs_trained(self) -> float:
        """Passes over the training images behind these weights; the x axis of every curve."""
        return self.steps_trained / self._steps_per_epoch

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        # The first hook of every run: what cannot work is said here, before data are fetched.
        if self.trainer.state.fn == "fit" and type(self).training_step is pl.LightningModule.training_step:
            raise PandaError(
                f"{self.method} has nothing to train: run `lightning test` with the same arguments, "
                "which builds its bank and saves it in last.ckpt."
            )
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no plugin of the user's
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        for logger in self.trainer.loggers:
            if isinstance(logger, AutoWandbLogger):
                run = {
                    key: getattr(self.trainer, key) for key in ("max_epochs", "max_steps", "world_size", "precision")
                }
                logger.describe(type(self.data).__name__, self.method, run)
        return [Health(), Media(), Report()]

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._parts.append((batch["index"], self.anomaly_score(batch), batch["label"]))

    test_step = validation_step

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"index": batch["index"], "score": self.anomaly_score(batch)}

    @override
    def on_validation_epoch_start(self) -> None:
        self._parts, self._merged = [], None

    on_test_epoch_start = on_validation_epoch_start

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_auroc("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_auroc("test")

    def merged_scores(self) -> Scores:
        """The scores of all processes, once all batches have been scored; every process must call it."""
        if self._merged is None:
            self._merged = Scores(*(column.cpu() for column in gather(self._parts)))
        return self._merged

    def _log_auroc(self, stage: str) -> None:
        scores = self.merged_scores()
        auroc = metrics.auroc(scores.score, scores.label)
        self.scores = scores
        if auroc != auroc and not self.trainer.sanity_checking:
            rank_zero_warn("AUROC is NaN: the images scored are all normal, or all anomalous.")
        values = {f"{stage}/auroc": auroc, "epochs_trained": self.epochs_trained}
        # the same on every process already; float64 so that no digit is lost
        self.log_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})

    def batch_mean(self, values: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """Mean of a value per image (B,) over the images of all processes, fillers left out.

        Processes average their gradients, so each weights its sum by their number: the gradient is that of one
        process with the whole batch.

        Returns:
            The mean, and the number of images behind it, which weights the step in an epoch's log; it stays on the
            device.
        """
        real = batch["index"] >= 0
        count = self.trainer.strategy.reduce(real.sum(), reduce_op="sum")
        return (values * real).sum() * self.trainer.world_size / count, count

    @override
    def on_train_start(self) -> None:
        self._steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.steps_trained += 1

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steps"] = {"trained": self.steps_trained, "per_epoch": self._steps_per_epoch}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps_trained = checkpoint["steps"]["trained"]
        self._steps_per_epoch = checkpoint["steps"]["per_epoch"]
