"""Rebuild the kNN index from features of the moment, before anything is scored."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from panda_lightning.types import PandaError


class RebuildIndex(pl.Callback):
    """Rebuilds bank and index before each validation of ``fit``, and where a checkpoint has none for its weights.

    Before the first training step it also runs one whole validation: that is DN2, the untrained network, at
    ``epochs_trained`` = 0. (Lightning drops the metrics of its own sanity check.)

    A detector that uses it has ``steps_trained``, ``bank_is_fresh``, ``rebuild_bank()`` and ``fit_index()``: see DN2.
    """

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.steps_trained == 0 and trainer.enable_validation:
            validate_now(trainer)

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

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._save(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        """Keep a bank that was made without training, and would be lost otherwise."""
        folder = trainer.log_dir  # asks all processes
        if trainer.ckpt_path is None and folder:
            path = Path(folder) / "checkpoints" / "last.ckpt"
            trainer.save_checkpoint(path, weights_only=True)
            rank_zero_info(f"Network and bank saved in {path}")

    def _prepare(self, detector: Any) -> int:
        if not detector.bank_is_fresh:
            try:
                detector.rebuild_bank()
            except PandaError as error:
                if detector.steps_trained == 0:
                    raise
                raise PandaError(
                    "the checkpoint has no bank for its weights (it was saved between two validations), and the normal "
                    f"images to make one are missing: {error}"
                ) from error
        return int(detector.fit_index())


def validate_now(trainer: pl.Trainer) -> None:
    """One whole validation before the next training step, as if Lightning had come to it."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
