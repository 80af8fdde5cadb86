"""Stop a run that makes no sense, and say what its numbers do not: how long it takes, what they lack, how it ended."""

import signal
import time
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from panda_lightning.callbacks.rebuild_index import validate_now
from panda_lightning.runtime.options import require_batches
from panda_lightning.types import Batch, PandaError

# Relative change up to which training moved nothing: digits at the published steps change their compactness by .002 to
# .008 and their AUROC by .0004 at most; the runs that move it by .001 or more, by .03 and more.
STILL = 0.01
# A loss that training lowers ends below its start. That of EWC at the published steps rises to hundreds of times its
# start where weight decay, which is added after gradients are clipped, pulls harder than they do.
RISEN = 2.0


class Health(pl.Callback):
    """Ends training at a NaN or infinite loss, and says what a person may not see in the numbers.

    It warns of scores that are constant to five digits, of an AUROC of part of the images, and of training that moved
    nothing or raised its loss, which it tells without labels. After the first epoch it says how long the others will
    take. The last step of a run is always validated, also where an epoch does not end there.

    A run that SIGTERM ends has exit status 143, so that a script does not go on as if it were done.

    The loss is looked at after every step on a CPU; on a GPU, where that would wait for the device, a flag is kept
    there and read every 50 steps and before each validation, which comes before each checkpoint.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None
        self._first_epoch: tuple[int, float] | None = None  # its number, and when it began
        self._has_risen = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if hasattr(type(pl_module.data), "test_images"):  # neither a user's own data module nor loose images
            require_batches(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        now, here = time.monotonic(), trainer.current_epoch
        first, begin = self._first_epoch = self._first_epoch or (here, now)
        timed, left = trainer.check_val_every_n_epoch or 1, (trainer.max_epochs or 0) - here
        other_end = trainer.max_steps != -1 or any(isinstance(c, Timer) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if here - first == timed and left > 1 and not other_end:
            one, bar = (now - begin) / timed, cast(Any, trainer.progress_bar_callback)
            line = "" if bar is None or bar.is_disabled else "\n"  # the bar stands on this one
            rank_zero_info(
                f"{line}An epoch takes "
                f"{_spoken(one)}{' with its validation' if trainer.enable_validation else ''}: about "
                f"{_spoken(one * left)} for the remaining {left}."
            )

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
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        before = getattr(pl_module, "compactness_before", None)
        if before is None or self._has_risen or "compactness" not in pl_module.terms:
            return
        loss = float(trainer.callback_metrics["train/loss"])
        if loss > RISEN * before:
            self._has_risen = True
            _say_why_it_rises(pl_module, loss)

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
        if scores is None or len(scores.score) < 2 or trainer.sanity_checking:
            return
        _say_if_partial(pl_module, trainer.val_dataloaders)
        least, most = scores.score.aminmax()
        if most - least <= 1e-5 * scores.score.abs().max():
            rank_zero_warn(
                f"Every image has the same anomaly score, {float(most):.6g}, to five digits: the features have "
                "collapsed to a point."
            )

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        _say_if_partial(pl_module, trainer.test_dataloaders)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.enable_validation and not pl_module.is_scored:
            validate_now(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _say_if_too_little(pl_module, trainer.callback_metrics.get("train/distance_from_start"))


def _say_if_too_little(detector: Any, distance: Tensor | None) -> None:
    """Warn where normal features and weights are as before training, or compactness is above the share to end at."""
    before = getattr(detector, "compactness_before", None)
    if before is None or distance is None or "compactness" not in detector.terms:
        return
    after = detector.compactness()
    if abs(after - before) <= STILL * before and distance <= STILL * _size_of_start(detector):
        said = "Training changed almost nothing"
    elif detector.enough and not detector.is_compact:
        said = f"Training ended before compactness fell to {detector.enough:g} of its start"
    else:
        return
    clip = detector.grad_clip
    rank_zero_warn(
        f"{said}: compactness is {after:.4g} after {detector.steps_trained} steps and was {before:.4g} before, "
        + (f"with gradients clipped to {clip:g}: " if clip else f"with lr {detector.lr:g}: ")
        + f"train more epochs, or raise {'model.grad_clip or ' if clip else ''}model.lr."
    )


def _say_why_it_rises(detector: Any, loss: float) -> None:
    """Warn of training that raises its loss, and name the pull of weight decay where it is the stronger one."""
    clip, decay = detector.grad_clip, detector.weight_decay * _size_of_start(detector)
    cure = f"lower model.lr{' or model.grad_clip' if clip else ', or set model.grad_clip'}"
    if clip and decay > clip:
        cure = (
            f"weight decay pulls {decay / clip:.2g} times as hard as gradients clipped to {clip:g}, so set "
            "model.weight_decay=0 or raise model.grad_clip"
        )
    rank_zero_warn(
        f"Training raises its loss: it is {loss:.4g} after {detector.epochs_trained:.3g} epochs and was "
        f"{detector.compactness_before:.4g} before: {cure}."
    )


def _size_of_start(detector: Any) -> float:
    """The norm of the adapted weights before training."""
    return float(torch.stack([p.float().norm() for p in detector.start.values()]).norm())


def _say_if_partial(detector: Any, loader: Any) -> None:
    """Warn where a limit of the Trainer leaves test images out."""
    scored, there = len(detector.scores.score), len(loader.dataset)
    if scored < there:
        rank_zero_warn(
            f"AUROC covers only the first {scored} of {there} test images: set data.test_limit for evenly spaced ones."
        )


def _spoken(seconds: float) -> str:
    """A time as one would say it: 35 s, 8 min, 2 h 10 min."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours > 1 else f"{60 * hours + minutes} min"
