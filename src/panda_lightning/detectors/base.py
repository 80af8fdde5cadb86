"""What every detector shares: scoring in validation, test and prediction, and the callbacks that look at it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from panda_lightning.callbacks import Health, Media, Predictions, Report
from panda_lightning.callbacks.rebuild_index import validate_now
from panda_lightning.formulas import metrics
from panda_lightning.runtime.checkpoints import WholeCheckpointIO
from panda_lightning.runtime.features import gather
from panda_lightning.runtime.loggers import AutoWandbLogger
from panda_lightning.types import Batch, PandaError, Scores


class Detector(pl.LightningModule, ABC):
    """Scores images by how anomalous they are.

    A method overrides ``anomaly_score`` and, if it learns, ``training_step`` and ``configure_optimizers``.

    Attributes:
        COMPUTING: Arguments that say how to compute, not what: they may differ from the checkpoint's.
        OUTLIERS: Whether training batches hold outliers too.
        terms: Names of the loss terms of the last training step.
        scores: Scores of the last whole validation or test, equal on every process.
        steps_trained: Optimiser steps behind the weights in use.
    """

    COMPUTING = ("optimize", "index_backend", "index_memory_mb", "prefix_cache_gb", "prefix_cache_dir", "shard_bank")
    OUTLIERS = False
    scores: Scores | None = None
    steps_trained: int = 0
    terms: tuple[str, ...] = ()
    _steps_per_epoch: int = 1
    _steps_scored: int = 0  # steps_trained at the last validation

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[tuple[Tensor, ...]] = []
        self._merged: Scores | None = None
        self._drawn: tuple[object, Tensor] = (None, torch.empty(0))

    @abstractmethod
    def anomaly_score(self, batch: Batch) -> Tensor:
        """Score images: (B,), higher is more anomalous."""

    @property
    def method(self) -> str:
        """Short name of the method, for the results' tables and W&B's job type."""
        return type(self).__name__

    @property
    def auroc_name(self) -> str:
        """What AUROC is called in logs: with the word oracle where test labels had a part in the detector."""
        return "auroc"

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
                if size := getattr(self.data, "batch_size", None):
                    run |= {"batch_size": size, "batch_size_per_process": size // self.trainer.world_size}
                logger.describe(type(self.data).__name__, self.method, run)
        return [Health(), Media(), Report(), Predictions()]

    @override
    def setup(self, stage: str) -> None:
        data = self.data
        if not hasattr(data, "normal_dataloader"):
            raise PandaError(
                f"{self.method} needs a data module with normal_dataloader(), which gives the normal training images "
                f"in order; got {type(data).__name__}. ImageFolder serves any folder of images."
            )
        if stage == "fit" and getattr(data, "outliers", None) and not self.OUTLIERS:
            raise PandaError(
                f"data.outliers={data.outliers} would be ignored, for {self.method} learns from normal images alone: "
                "leave it out, or take --model PANDAOE."
            )

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"index": batch["index"], "score": self.anomaly_score(batch)}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        found = self.predict_step(batch, batch_idx)
        self._parts.append((found["index"], found["score"], batch["label"]))
        return found

    test_step = validation_step

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
        self.scores, self._steps_scored = scores, self.steps_trained
        if auroc != auroc and not self.trainer.sanity_checking:
            rank_zero_warn("AUROC is NaN: the images scored are all normal, or all anomalous.")
        values = {f"{stage}/{self.auroc_name}": auroc, "epochs_trained": self.epochs_trained}
        # the same on every process already; float64 so that no digit is lost
        self.log_dict({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})

    def batch_mean(self, values: Tensor, index: Tensor) -> tuple[Tensor, Any]:
        """Mean of a value per image (B,) over the images of all processes, fillers (index -1) left out.

        Processes average their gradients, so each weights its sum by their number: the gradient is that of one
        process with the whole batch.

        Returns:
            The mean, and the number of images behind it, which weights the step in an epoch's log; it stays on the
            device.
        """
        real = index >= 0
        count = self.trainer.strategy.reduce(real.sum(), reduce_op="sum")
        return (values * real).sum() * self.trainer.world_size / count, count

    @staticmethod
    def real_images(batch: Batch) -> Batch:
        """The batch without fillers (index -1), for networks whose images are not independent; it may be empty."""
        real = batch["index"] >= 0
        kept: Any = {key: value[real] for key, value in batch.items()}  # type: ignore[index]
        return cast(Batch, kept)

    def of_all(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (B, ...) of all processes, as many on each, fillers (index -1) left out; gradients flow back to each."""
        if self.trainer.world_size == 1:
            return rows
        everyone, places = (cast(Tensor, self.all_gather(t, sync_grads=True)).flatten(0, 1) for t in (rows, index))
        return everyone[places >= 0]

    def logged_sum(self, terms: dict[str, Tensor], count: Any) -> Tensor:
        """Sum of the loss terms of a step over ``count`` images, each logged by its name."""
        self.terms = tuple(terms)
        loss = torch.stack(list(terms.values())).sum()
        how: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": count}
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, **how)
        self.log("train/loss", loss, prog_bar=True, **how)
        return loss

    def draws(self, batch: Batch, columns: int) -> Tensor:
        """Uniform random numbers in [0, 1) for augmentation, (B, columns).

        They depend on seed, epoch and image alone: the same for any number of processes, and after a resume.
        """
        size, place = len(self.data.normal_images), (self.data.seed, self.current_epoch, columns)
        if self._drawn[0] != place:
            generator = torch.Generator().manual_seed(hash(place) % 2**63)
            self._drawn = (place, torch.rand(size, columns, generator=generator).to(self.device))
        return self._drawn[1][batch["index"].clamp(min=0)]

    @override
    def on_train_start(self) -> None:
        self._steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        epochs, rest = divmod(self.steps_trained, self._steps_per_epoch)
        due = not rest and epochs % (self.trainer.check_val_every_n_epoch or 1) == 0
        if due and self.trainer.enable_validation and self.steps_trained != self._steps_scored:
            # the checkpoint is of an epoch's last step, and Lightning takes that epoch's validation for done
            validate_now(self.trainer)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.steps_trained += 1

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        steps = {"trained": self.steps_trained, "per_epoch": self._steps_per_epoch, "scored": self._steps_scored}
        checkpoint["steps"] = steps

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps_trained, self._steps_per_epoch, self._steps_scored = checkpoint["steps"].values()


@contextmanager
def seeded() -> Iterator[None]:
    """Draw new layers from the run's seed alone: the same ones however many processes have drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield
