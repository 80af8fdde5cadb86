"""Options of Lightning's Trainer that would give wrong numbers here, refused before work starts."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.utilities import rank_zero_info

from panda_lightning.types import PandaError

CALLBACKS: dict[type[pl.Callback], str] = {  # what each does that cannot be right here, and what to do
    StochasticWeightAveraging: "resets BatchNorm in an epoch that trains nothing: use WeightAveraging or "
    "EMAWeightAveraging",
    GradientAccumulationScheduler: "changes the number of steps in an epoch, by which epochs are counted: set "
    "trainer.accumulate_grad_batches",
    LearningRateFinder: "judges rates by the loss, which does not show how well anomalies are detected: set model.lr",
    BatchSizeFinder: "changes a size that the method depends on: set data.batch_size",
    BaseFinetuning: "trains other layers than the detector does: set model.adapt_stages",
    ModelPruning: "renames weights that the detector knows by name: leave it out",
}
LIMITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


def require_options(trainer: Any) -> None:
    """Refuse options and callbacks of a Trainer; say where test labels choose the epoch.

    Raises:
        PandaError: Naming the option and what to do.
    """
    for callback in trainer.callbacks:
        fault = next((fault for kind, fault in CALLBACKS.items() if isinstance(callback, kind)), None)
        if fault is not None:
            raise PandaError(f"{type(callback).__name__} {fault}.")
        if isinstance(callback, EMAWeightAveraging) and callback.update_starting_at_epoch is not None:
            raise PandaError(
                f"EMAWeightAveraging's update_starting_at_epoch={callback.update_starting_at_epoch} averages "
                "once more after an epoch's validation, so no checkpoint has the weights that were scored: use "
                "update_starting_at_step."
            )
    verb = _verb(trainer)
    own = f"limit_{LIMITS[verb][0]}_batches"
    if getattr(trainer, own) == 0:
        raise PandaError(f"trainer.{own}=0 leaves no batches to {verb}: choose more.")
    if verb != "fit":
        return
    if trainer.overfit_batches:
        raise PandaError(
            f"trainer.overfit_batches={trainer.overfit_batches} uses the first images, which in a test set are "
            "often of one class: set data.train_limit and data.test_limit, which take evenly spaced ones."
        )
    if trainer.barebones:
        raise PandaError(
            "trainer.barebones=true turns off the metrics that training is judged by: set logger, "
            "enable_checkpointing, enable_progress_bar and enable_model_summary to false instead."
        )
    detector = trainer.lightning_module
    users = detector is not None and not type(detector).__module__.startswith("panda_lightning.")  # may have BatchNorm
    if not users and getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise PandaError(
            "trainer.sync_batchnorm=true has no effect: BatchNorm of a pretrained network does not learn, and "
            "BatchNorm of other networks here already sees the images of all processes. Leave it out."
        )
    for callback in trainer.callbacks:
        if str(getattr(callback, "monitor", "")).startswith("val/"):
            rank_zero_info(
                f"{type(callback).__name__} monitors {callback.monitor}: test labels then choose the epoch, so "
                "its result is an oracle result."
            )


def require_batches(trainer: Any, detector: Any) -> None:
    """Refuse what does not suit the images of a run, once they are listed and before they are decoded.

    Raises:
        PandaError: Naming the option and what to do.
    """
    verb, batches = _verb(trainer), {}
    for what in LIMITS[verb]:
        count, limit = trainer.datamodule.steps(what == "train"), getattr(trainer, f"limit_{what}_batches")
        batches[what] = min(count, limit) if isinstance(limit, int) else int(count * limit)
        if limit and count and not batches[what]:
            raise PandaError(
                f"trainer.limit_{what}_batches={limit} of {count} batches leaves none: choose {1 / count:.3g} or more."
            )
    every = getattr(trainer, "val_check_interval", None)
    if (
        isinstance(every, int)
        and trainer.check_val_every_n_epoch is not None
        and batches.get("val")
        and every > batches["train"]
    ):
        raise PandaError(
            f"trainer.val_check_interval={every} is more than the {batches['train']} batches of an epoch: choose "
            "fewer, or check_val_every_n_epoch=null to count over epochs."
        )
    averaging = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)
    if verb == "fit" and averaging and next(detector.parameters(), None) is None:
        raise PandaError(
            f"weights cannot be averaged before they exist, but {detector.method} makes its network only when it "
            "knows its images: leave WeightAveraging out."
        )


def _verb(trainer: Any) -> str:
    assert trainer.state.fn is not None
    return str(trainer.state.fn.value)
