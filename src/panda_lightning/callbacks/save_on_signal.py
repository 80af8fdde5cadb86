"""Checkpoints in the midst of an epoch: when the run is told to end, and every so many steps."""

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from panda_lightning.arguments import Checked, Count
from panda_lightning.runtime.checkpoints import checkpoint_folder
from panda_lightning.runtime.systems import ENDING, TRY_AGAIN
from panda_lightning.types import Batch


class SaveOnSignal(Checked, pl.Callback):
    """Saves a checkpoint and ends the run after the current training step when it gets SIGUSR1 or SIGTERM.

    The checkpoint is ``last.ckpt`` in the folder of the other checkpoints, the exit status is 75 ("try again later"),
    and ``--ckpt_path last`` resumes with the next batch. A signal during validation takes effect after the next
    training step; before training has started it ends the process immediately. On Windows the signal is Ctrl-Break. The
    callback replaces Lightning's own handlers: its Slurm handler saves at any point, even in the middle of a step, and
    its SIGTERM handler communicates with the other processes from there.

    Args:
        every_n_steps: Also save that checkpoint every ``every_n_steps`` optimiser steps, for runs that are killed
            without a signal; None does not.
    """

    def __init__(self, every_n_steps: Count | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._told = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        for number in ENDING:  # in place of Lightning's, which puts back what was before
            signal.signal(number, self._hear)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        told = trainer.strategy.reduce_boolean_decision(self._told, all=False)  # processes hear it at different times
        if told or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            path = checkpoint_folder(trainer) / "last.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            if told:
                rank_zero_info(f"Stopped by a signal: resume with --ckpt_path {path}")
                raise SystemExit(TRY_AGAIN if trainer.is_global_zero else 0)  # one status for any launcher
