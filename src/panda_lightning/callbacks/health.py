"""Stop a run whose numbers are no longer numbers, and say how it ended and when scores tell nothing apart."""

import signal
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from panda_lightning.types import Batch, PandaError


class Health(pl.Callback):
    """Ends training at a NaN or infinite loss, and warns of scores that are constant to five digits.

    A run that SIGTERM ends has exit status 143, so that a script does not go on as if it were done.

    The loss is looked at after every step on a CPU; on a GPU, where that would wait for the device, a flag is kept
    there and read every 50 steps and before each validation, which comes before each checkpoint.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, device=loss.device)
        bad = ~torch.isfinite(loss) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, batch_idx, self._first_bad)
        if loss.device.type == "cpu" or batch_idx % 50 == 0 or trainer.is_last_batch:
            self._check(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        if self._first_bad is None or int(self._first_bad) < 0:
            return
        saved: Any = trainer.checkpoint_callback
        path = getattr(saved, "last_model_path", "") or getattr(saved, "best_model_path", "")
        raise PandaError(
            f"the loss became NaN or infinite at batch {int(self._first_bad)} of epoch {trainer.current_epoch}: lower "
            f"lr or grad_clip, or use float32. {f'The last good checkpoint is {path}.' if path else 'None was saved.'}"
        )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):  # without a status, as if the run were done
            exception.code = 128 + signal.SIGTERM

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        scores = pl_module.scores
        if scores is None or len(scores.score) < 2:
            return
        least, most = scores.score.aminmax()
        if most - least <= 1e-5 * scores.score.abs().max():
            rank_zero_warn(
                f"Every image has the same anomaly score, {float(most):.6g}, to five digits: the features have "
                "collapsed to a point."
            )
