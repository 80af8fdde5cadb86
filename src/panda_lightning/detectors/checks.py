"""What a detector cannot do is refused in a sentence, as early as it can be known."""

from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from panda_lightning.arguments import Count, require
from panda_lightning.runtime.options import require_options
from panda_lightning.runtime.sizes import in_words
from panda_lightning.runtime.systems import memory_of
from panda_lightning.types import PandaError, Scores


def require_possible(detector: Any) -> None:
    """Refuse a run whose method and Trainer do not go together, before data are fetched.

    Raises:
        PandaError: Saying what to do.
    """
    trainer = detector.trainer
    if trainer.state.fn == "fit" and not detector.learns:
        raise PandaError(
            f"{detector.method} has nothing to train: run `lightning test` with the same arguments, "
            "which builds its bank and saves it in last.ckpt."
        )
    if trainer.state.fn == "fit" and not detector.automatic_optimization:
        raise PandaError(
            f"{detector.method} sets automatic_optimization=False, and its steps would not be counted: let Lightning "
            "optimise, with one optimiser."
        )
    for name, hint in (("accumulate_grad_batches", Count), ("check_val_every_n_epoch", Count | None)):
        require(f"trainer.{name}", getattr(trainer, name), hint)
    require_options(trainer)


def require_data(detector: Any, stage: str) -> None:
    """Refuse a data module that the method cannot use at this stage of a run.

    Raises:
        PandaError: Saying what to do.
    """
    data = detector.data
    if stage == "predict" and not hasattr(data, "names"):
        raise PandaError(
            f"{detector.method} predicts images of a data module, such as UnlabelledImages; got {type(data).__name__}. "
            "For pictures in memory use detector.score()."
        )
    if stage != "predict" and not (hasattr(data, "normal_dataloader") and hasattr(type(data), "problem")):
        raise PandaError(
            f"{detector.method} needs an AnomalyDataModule, whose normal_dataloader() gives the normal training images "
            f"in order; got {type(data).__name__}. ImageFolder serves any folder of images."
        )
    held = stage == "fit" and bool(getattr(data, "calibration_fraction", 0))
    if held and not detector.trainer.limit_val_batches and not detector.has_bank:
        raise PandaError(
            f"data.calibration_fraction={data.calibration_fraction:g} holds back images that {detector.method} "
            "scores in validations, so it needs validations: leave trainer.limit_val_batches=0 out."
        )
    if stage == "fit" and getattr(data, "outliers", None) and not detector.OUTLIERS:
        raise PandaError(
            f"data.outliers={data.outliers} would be ignored, because {detector.method} learns only from normal "
            "images: leave it out, or use --model PANDAOE."
        )


def require_shapes(detector: Any, view: Any) -> None:
    """Refuse images of shapes that the method cannot take.

    Args:
        detector: A Detector.
        view: A View.

    Raises:
        PandaError: Saying which it takes.
    """
    takes, wanted = detector.SHAPES, f"image_size={view.words['image_size']}"
    if takes != "any" and view.sides is None:
        raise PandaError(
            f"crop=none gives images of different sizes, but {detector.method} needs one size: choose "
            "crop=center or squash"
            + (", with image_size=[H, W] for images that are not square." if takes == "one" else ".")
        )
    if takes == "square" and len(set(view.sides)) > 1:
        raise PandaError(f"{wanted} is not square, but {detector.method} needs square images: give one side.")


def require_learned(detector: Any) -> None:
    """Refuse to score before anything was learned.

    Raises:
        PandaError: Saying what to do.
    """
    if detector.learns and not detector._keeps:
        raise PandaError(
            f"{detector.method} is untrained, so it cannot score: train it with fit, or give ckpt_path. To score "
            "with a pretrained network without training, use DN2."
        )
    if detector.origin is None:
        raise PandaError(
            f"{detector.method} has not seen any normal images yet: test it once with a data set, or load a "
            f"checkpoint with {type(detector).__name__}.load_from_checkpoint."
        )


def require_own_images(detector: Any, now: dict[str, Any]) -> None:
    """Refuse to make a bank of other images than the detector was derived from.

    Args:
        detector: A Detector.
        now: The origin of what this run derives.

    Raises:
        PandaError: If they are missing or others.
    """
    what = "normal training images"
    if detector.origin is not None and now.get(what) != detector.origin[what]:
        here = "are missing" if now.get(what) is None else "are different ones"
        raise PandaError(
            f"{detector.method} has no bank for its weights (it was saved between two validations), and the "
            f"{what} that it learned from {here} here: give the same images, or a checkpoint from the end of an "
            "epoch."
        )


def require_neighbours(detector: Any, data: Any) -> None:
    """Refuse images that do not make the bank that a detector asks for.

    Args:
        detector: A DN2.
        data: Its data module.

    Raises:
        PandaError: Saying what to do.
    """
    if detector.shard_bank and data.view.sides is None:
        raise PandaError(
            "shard_bank needs images of one size, but crop=none gives different sizes: leave one of the two out."
        )
    if detector.bank is not None:
        return
    size = len(data.normal_images)
    require_enough(detector.k, size)
    if hasattr(detector, "backbone"):
        _require_room(detector, size)


def require_enough(k: int, size: int) -> None:
    """Refuse more neighbours than there are images."""
    if k > size:
        raise PandaError(f"k={k} neighbours, but there are {size} normal training images: choose 1 to {size}.")


def _require_room(detector: Any, count: int) -> None:
    """Refuse a bank that the device cannot hold, before any image is decoded, and say what a large one takes.

    Centroids are no cure: they are made of the whole bank, which stays.

    Args:
        detector: A DN2 that is to make its bank.
        count: How many normal images there are.

    Raises:
        PandaError: Saying how many images fit.
    """
    strategy, dim = detector.trainer.strategy, detector.backbone.num_features
    device, world = strategy.root_device, detector.trainer.world_size
    held = -(-count // world) if detector.shard_bank else count
    needed = 2 * 4 * held * dim  # float32, the index has a copy of its own
    memory = memory_of(device)
    if not strategy.reduce_boolean_decision(memory is None or needed <= memory[0]):
        free, most = (in_words(memory[0]), memory[0] // (8 * dim) * (count // held)) if memory else ("less", 0)
        share = "" if detector.shard_bank or detector.centroids else ", or model.shard_bank=true with more processes"
        limit = f"data.train_limit={most}" if 0 < most < count else "a smaller data.train_limit"
        raise PandaError(
            f"the bank of {count} normal images with {dim} features takes {in_words(needed)} on {device} (half of it "
            f"for its index), but {free} are free: set {limit}{share}."
        )
    if memory is not None and needed > memory[1] / 10:
        rank_zero_info(
            f"{detector.method}: the bank of {count} normal images with {dim} features will take "
            f"{in_words(needed)} of the {in_words(memory[0])} free on {device} (half of it for its index)."
        )


def require_finite(detector: Any, most: Tensor) -> None:
    """Refuse features of normal images that are not numbers, or too large for the bank; every process must call it.

    Args:
        detector: A SegmentationDetector.
        most: The largest size of a feature on this process, NaN where one is no number.

    Raises:
        PandaError: Saying what to do.
    """
    limit = torch.finfo(torch.float16 if detector.half_bank else torch.float32).max
    strategy = detector.trainer.strategy
    if strategy.reduce_boolean_decision(bool(most <= limit)):
        return
    if detector.half_bank and not strategy.reduce_boolean_decision(bool(most.isnan()), all=False):
        raise PandaError(
            "normal features are too large for float16, which ends at 65504: leave half_bank out, or use "
            "float32 if this run used half precision."
        )
    raise PandaError(
        f"{detector.method}'s features of the normal images are not all finite numbers: use trainer.precision=32-true, "
        "or weights that fit the network."
    )


# ---- training that goes on -------------------------------------------------------------------------------------------


def require_new_trainer(trainer: Any) -> None:
    """Refuse a Trainer that has trained already.

    Raises:
        PandaError: Saying how training goes on.
    """
    if trainer.global_step:
        raise PandaError(
            f"this Trainer has already made {trainer.global_step} steps: make a new one, and give ckpt_path to "
            "continue training (Lightning would continue without the optimiser's state)."
        )


def require_kind(found: str, own: str) -> None:
    """Refuse a checkpoint of another class of detectors.

    Raises:
        PandaError: Naming both.
    """
    if found != own:
        raise PandaError(
            f"the checkpoint is from {found}, not {own}: use {found}, or give the checkpoint as backbone to use "
            "only its network."
        )


def require_optimizer(checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint from which no training can go on.

    Raises:
        PandaError: If it holds weights alone.
    """
    if "optimizer_states" not in checkpoint:
        raise PandaError(
            "the checkpoint has only weights (save_weights_only, or a test saved it), so training cannot resume "
            "from it: test it, or start a new run."
        )


def require_to_go_on(detector: Any, steps: int, before: int) -> None:
    """Refuse a checkpoint whose steps are not those of this run.

    Args:
        detector: A Detector; one that has not been trained may start.
        steps: Of an epoch here.
        before: Of an epoch in the run that the checkpoint comes from.

    Raises:
        PandaError: Saying what to give.
    """
    trained, made = detector.steps_trained, detector.trainer.global_step
    if made != trained:  # so it is with a used Trainer, too
        raise PandaError(
            f"the checkpoint's weights were trained for {trained} steps, but the Trainer that saved it had made "
            f"{made} (for example after a test): test it; training cannot resume from it."
        )
    if trained and steps != before:
        raise PandaError(
            f"an epoch has {steps} steps here, but {before} in the run to resume: use the same data, batch size "
            "and Trainer options, or start a new run."
        )


# ---- numbers that cannot be ------------------------------------------------------------------------------------------


def say_no_auroc(trainer: Any, name: str, scores: Scores) -> None:
    """Warn that images of one kind have no AUROC.

    Args:
        trainer: Whose callbacks may wait for it.
        name: What it is called in logs.
        scores: Of a whole validation or test.

    Raises:
        PandaError: If a callback waits for it.
    """
    kind = "anomalous" if scores.label.any() else "normal"
    why = f"the {len(scores.label)} images scored are all {kind}" if len(scores.label) else "nothing is scored"
    rank_zero_warn(f"There is no {name}: {why}.")
    for callback in trainer.callbacks:
        if getattr(callback, "monitor", None) == name:
            raise PandaError(f"{type(callback).__name__} monitors {name}, but {why}: leave monitor={name} out.")
