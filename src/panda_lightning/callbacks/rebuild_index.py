"""Rebuild the kNN index from features of the moment, before anything is scored."""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from typing_extensions import override

from panda_lightning.runtime.averages import as_saved
from panda_lightning.runtime.checkpoints import save_beside


class RebuildIndex(pl.Callback):
    """Rebuilds bank and index before each validation of ``fit``, and where there is no bank for the weights in use.

    Before the first training step it also runs one whole validation: that is DN2, the untrained network, at
    ``epochs_trained`` = 0. (Lightning drops the metrics of its own sanity check.)

    An epoch that ends without its validation gets a bank too, so that the checkpoint written then can be tested where
    there are no training images.

    It stands beside detectors with ``make_bank``.
    """

    def __init__(self) -> None:
        self._made = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.steps_trained == 0 and trainer.enable_validation:
            validate_now(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        each = trainer.check_val_every_n_epoch == 1 and getattr(trainer, "val_check_interval", None) == 1
        if each or not trainer.enable_validation:  # else checkpoints are written after validations
            with as_saved(trainer, pl_module):
                if not pl_module.bank_is_fresh:
                    self._prepare(pl_module)
                    pl_module.hold_out()

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        start = time.perf_counter()
        size = self._prepare(pl_module)
        values = {"bank/size": float(size), "bank/seconds": time.perf_counter() - start}
        pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()}, rank_zero_only=True)

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._prepare(pl_module)

    @override
    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._prepare(pl_module)

    def _prepare(self, detector: Any) -> int:
        if not detector.bank_is_fresh:
            detector.rebuild_bank()
            self._made = True
        return int(detector.fit_index())

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._save(trainer, pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, detector: Any) -> None:
        """Keep a bank that was made without training, and would be lost otherwise."""
        if not detector.learns and self._made:
            save_beside(trainer)


def validate_now(trainer: pl.Trainer) -> None:
    """One whole validation before the next training step, as if Lightning had come to it."""
    trainer.validating = True
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # else it counts the batches of the checkpoint's last one
    loop.run()
    loop._has_run = False  # else an epoch that is resumed after its last step, and all after it, count as done
    trainer.training = True


def validation_was_due(trainer: pl.Trainer, epoch: int) -> bool:
    """Whether the last step of the checkpoint that a run goes on from calls for a validation.

    Lightning takes it for done, but the checkpoint may have been written before it.

    Args:
        trainer: At the start of training.
        epoch: That the step belongs to, counted from 1.
    """
    done: Any = trainer.fit_loop.epoch_loop.batch_progress
    each = trainer.check_val_every_n_epoch
    batches = done.total.processed if each is None else done.current.processed
    interval = trainer.val_check_batch  # None where the clock decides
    if not (trainer.enable_validation and batches and interval):
        return False
    return batches % interval == 0 and (each is None or epoch % each == 0)
