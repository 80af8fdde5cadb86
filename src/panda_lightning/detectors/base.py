"""What every detector shares: scoring in validation, test and prediction, and the state that a run derives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from panda_lightning.arguments import Checked
from panda_lightning.callbacks import Health, Media, Predictions, RebuildIndex, Report
from panda_lightning.callbacks.rebuild_index import validate_now, validation_was_due
from panda_lightning.detectors import checks, origins, precision, scoring
from panda_lightning.detectors.calibrating import Calibrated
from panda_lightning.formulas import metrics
from panda_lightning.runtime.checkpoints import FORMAT, require_format, write_whole
from panda_lightning.runtime.derived import Derived, mapped
from panda_lightning.runtime.fingerprint import checksum
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.loggers import introduce
from panda_lightning.runtime.processes import sum_of_all
from panda_lightning.runtime.results import Calibration, Results
from panda_lightning.types import Batch, PandaError, Scores


class Detector(Calibrated, Checked, pl.LightningModule, ABC):
    """Scores images by how anomalous they are.

    A method overrides ``anomaly_score``. If it learns, it also overrides ``training_step``, ``configure_optimizers``
    and ``fresh_networks``; if it scores with a bank of normal images, ``make_bank`` and ``fit_index``.

    State that a run derives from weights and images is ``Derived``, and belongs to its ``origin``: the images and
    arguments it was derived from. A run compares origins before it decodes images (``accept``). A detector that was
    trained, or loaded from a checkpoint, keeps its state and refuses other preprocessing, or another problem on the
    same data set. A bank that was built by a test is rebuilt for other images, arguments or precision. ``fit`` without
    a checkpoint starts from fresh weights.

    Attributes:
        COMPUTING: Arguments that change how results are computed, not the results: they may differ from the
            checkpoint's.
        SCORING: Arguments that only scoring uses: after a change nothing has to be derived again.
        SHAPING: Arguments that make the networks: they cannot change when these are there.
        OUTLIERS: Whether training batches contain outliers too.
        SHAPES: Which images the method accepts: of different sizes, of one size, or squares of one size.
        derived: State derived by runs, by attribute; see Derived.
        origin: Images and arguments it was derived from, see AnomalyDataModule.origin; None before any run.
        run_id: Name of the run that derived it; a resumed run keeps the name.
        bank: Bank of normal images for scoring; None if the method has none, or before it is built.
        bank_weights: Checksum of the weights the bank was built with.
        bank_names: Names of the normal images in the bank.
        steps_trained: Number of optimiser steps that the current weights were trained for.
        terms: Names of the loss terms of the last training step.
    """

    COMPUTING: tuple[str, ...] = (
        "optimize", "index_backend", "index_memory_mb", "prefix_cache_gb", "prefix_cache_dir", "shard_bank",
    )  # fmt: skip
    SCORING: tuple[str, ...] = ()
    SHAPING: tuple[str, ...] = ()
    OUTLIERS = False
    SHAPES: Literal["any", "one", "square"] = "any"

    origin = Derived[dict[str, Any] | None](None)
    run_id = Derived[str]("")
    bank = Derived[Any](None)
    bank_weights = Derived[str]("")
    bank_names = Derived[list[str]]([])
    steps_trained = Derived[int](0)
    _steps_per_epoch = Derived[int](1)
    _steps_scored = Derived[int](0)  # steps_trained at the last validation
    _scored = Derived[tuple[Tensor, ...] | None](None)

    LISTED = 5  # nearest normal images that are named, or more where the score is made of more

    terms: tuple[str, ...] = ()
    maps = False  # whether prediction draws how a pooled distance is made up, where that can be told
    interpolation: str | None = None  # how the network wants images resized; None is no matter
    multiple = 1  # of which the network wants sides of images to be

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "anomaly_score" in vars(cls) and "explained" not in vars(cls):
            cls.explained = Detector.explained  # type: ignore[method-assign]  # what is inherited explains another score

    def __init__(self) -> None:
        super().__init__()
        self.derived: dict[str, Any] = {}
        self._given = False  # whether the state came from a checkpoint or another process
        self._restored = False  # in the run under way
        self._moved = False  # whether weights are those of a training whose state is forgotten
        self._fresh: dict[str, Tensor] | None = None  # what training changes, as it was before; lives in memory alone
        self._wide: dict[str, Tensor] | None = None  # weights before a run in half precision alone
        self._now: dict[str, Any] = {}  # the origin of what that run derives
        self._parts: list[tuple[Tensor, ...]] = []
        self._merged: Scores | None = None
        self._drawn: tuple[Any, Tensor] | None = None  # random numbers of an epoch, see steps.draws
        self._ready: tuple[list[Any], Any, Any, Calibration | None] | None = None  # see scoring.ready

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.SHAPING and self.__dict__.get("_modules") and value != getattr(self, name):
            raise PandaError(
                f"{name}={value} would make another network than {self.method} has already, with "
                f"{name}={getattr(self, name)}: make a new detector."
            )
        super().__setattr__(name, value)

    @abstractmethod
    def anomaly_score(self, batch: Batch) -> Tensor:
        """Score images: (B,), higher is more anomalous."""

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a validation needs and an exported file gives: score (B,), and of some methods map (B, H, W)."""
        return {"score": self.anomaly_score(batch)}

    def explained(self, batch: Batch) -> dict[str, Tensor]:
        """The same as ``score``, with what it is made of, where the method can tell.

        Returns:
            score (B,); map (B, H, W), as large as the images; neighbour (B, n), rows of the nearest normal images, and
            distance (B, n) to them, ascending.
        """
        return {"score": self.anomaly_score(batch)}

    def all_scored(self) -> None:
        """Every process calls it when it has no more images to score."""

    def score(self, images: Any, **options: Any) -> Results:
        """Score pictures without a Trainer: files, folders, patterns, or pictures in memory; see detectors/scoring.py.

        Args:
            images: See pictures.loose.pointed_at.
            options: See detectors.scoring.score.
        """
        return scoring.score(self, images, **options)

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
    def scores(self) -> Scores | None:
        """Scores of the last whole validation or test, equal on every process."""
        return None if self._scored is None else Scores(*self._scored)

    @property
    def epochs_trained(self) -> float:
        """Passes over the training images behind these weights; the x axis of every curve."""
        return self.steps_trained / self._steps_per_epoch

    @property
    def is_scored(self) -> bool:
        """Whether the last step of training has had its validation."""
        return self.steps_trained == self._steps_scored

    @property
    def has_bank(self) -> bool:
        """Whether scores are looked up in a bank of normal images."""
        return type(self).make_bank is not Detector.make_bank

    @property
    def learns(self) -> bool:
        """Whether the method has training steps."""
        return type(self).training_step is not pl.LightningModule.training_step

    # ---- what was derived, and from what ---------------------------------------------------------------------------

    def fresh_networks(self) -> dict[str, nn.Module]:
        """The networks that training changes, by attribute, as they are before it."""
        return {}

    def trained_with(self, data: str) -> dict[str, Any]:
        """What a data module of this class name takes over where it was left open: view, and normal class."""
        if self.origin is None or not self._keeps:
            return {}
        same = self.origin["data"] == data
        return {**self.origin["view"], **(self.origin["problem"] if same else {})}

    @property
    def _keeps(self) -> bool:
        return self._given or self.steps_trained > 0

    def accept(self, data: Any) -> None:
        """Compare the images of a run with what this detector was derived from; a run asks before it decodes any.

        Raises:
            PandaError: If its state does not suit them, or there is none and scores would be those of fresh weights.
        """
        origins.compare(self, data)
        checks.require_shapes(self, data.view)

    def require_learned(self) -> None:
        """Refuse to score before anything was learned.

        Raises:
            PandaError: Saying what to do.
        """
        checks.require_learned(self)

    def start_anew(self) -> None:
        """Give the networks the weights that they had before training."""
        origins.start_anew(self)

    def whole(self) -> dict[str, Any]:
        """``derived`` with what other processes hold of it; every process must call it."""
        return dict(self.derived)

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` holds beside weights: plain tensors on the CPU, and primitives."""
        derived = mapped(self.whole(), lambda tensor: tensor.cpu())
        return {"format": FORMAT, "detector": origins.kind(self), "derived": derived}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint or another process derived; comes before weights are loaded."""
        checks.require_kind(state["detector"], origins.kind(self))
        self.derived, self._given, self._moved = dict(state["derived"]), True, False

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        origins.describe(self, checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_format(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            checks.require_optimizer(checkpoint)
        self._restored = True

    # ---- a bank ----------------------------------------------------------------------------------------------------

    def make_bank(self) -> Any:
        """Make of the normal training images, with the weights of this moment, what scores are looked up in."""
        raise NotImplementedError

    def drop_bank(self) -> None:
        """Let go of the bank and what was made of it, so that the next one has its memory."""
        self.bank = self._ready = None

    def fit_index(self) -> int:
        """Make the bank searchable on this device; returns how many entries there are."""
        raise NotImplementedError

    def _weights(self) -> str:
        return checksum((*self.parameters(), *self.buffers()))

    @property
    def bank_is_fresh(self) -> bool:
        """Whether the bank was made with the weights in use."""
        return self.bank is not None and self.bank_weights == self._weights()

    def trace_search(self, index: Any, keep: Callable[[Tensor], Tensor]) -> None:
        """Search with a TracedIndex from now on, in what ``keep`` makes of the bank, where there is a search."""

    def rebuild_bank(self) -> None:
        """Make the bank with the weights in use.

        Raises:
            PandaError: If the normal images that this detector was derived from are not those of the run.
        """
        checks.require_own_images(self, self._now)
        self.drop_bank()
        with precision.computed_as(self):
            self.bank, self.bank_weights = self.make_bank(), self._weights()
        shown: Any = getattr(self.data.normal_dataloader(), "dataset", None)  # a user's own may have no names
        self.bank_names = shown.images.paths() if hasattr(shown, "images") else []

    @property
    def precision(self) -> str:
        """In which scores are computed: the run's; of what is kept, and without a run, that of its origin.

        A Trainer that asks for nothing (32-true) tests and predicts as the origin was computed, where that was mixed.
        """
        return precision.of_scores(self)

    # ---- a run -----------------------------------------------------------------------------------------------------

    def load_networks(self) -> None:
        """Load what a run needs from elsewhere; what cannot be had is said before there is a log."""

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        # The first hook of every run: what cannot work is said here, before data are fetched.
        checks.require_possible(self)
        write_whole(self.trainer)
        self.load_networks()
        introduce(self.trainer, self.method)
        banks = [RebuildIndex()] if self.has_bank else []
        own = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [*banks, Health(), Media(), *(kind() for kind in (Report, Predictions) if kind not in own)]

    @override
    def setup(self, stage: str) -> None:
        self._restored, self._now = False, {}
        precision.widen(self)  # a run that an error ended has not come to its teardown
        if stage == "fit":  # a checkpoint, if there is one, comes later
            self._moved |= self.steps_trained > 0
            self.derived.clear()
            self._given = False
            self.train()  # Lightning leaves a module in eval mode after predict, and BatchNorm would then not learn
        precision.keep_wide(self, stage)
        checks.require_data(self, stage)

    @override
    def teardown(self, stage: str) -> None:
        precision.widen(self)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        with precision.computed_as(self):
            return {"index": batch["index"], **self.explained(batch)}

    @override
    def on_predict_epoch_end(self) -> None:
        self.all_scored()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        with precision.computed_as(self):
            found = {"index": batch["index"], **self.outputs(batch)}
        self._parts.append((found["index"], found["score"], batch["label"]))
        return found

    test_step = validation_step

    @override
    def on_validation_epoch_start(self) -> None:
        self._parts, self._merged = [], None
        self.hold_out()  # now, with the weights that are saved: averages are taken back before the epoch's end

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
            self.all_scored()
            self._merged = Scores(*(column.cpu() for column in gather(self._parts)))
        return self._merged

    def _log_auroc(self, stage: str) -> None:
        scores, name = self.merged_scores(), f"{stage}/{self.auroc_name}"
        self._scored, self._steps_scored = (scores.index, scores.score, scores.label), self.steps_trained
        values = {"epochs_trained": self.epochs_trained}
        if scores.both:
            values[name] = metrics.auroc(scores.score, scores.label)
        elif not self.trainer.sanity_checking:
            checks.say_no_auroc(self.trainer, name, scores)
        # the same on every process already; float64 so that no digit is lost
        for key, value in values.items():
            self.log(key, torch.tensor(value, dtype=torch.float64), prog_bar=key == name)

    def batch_mean(self, values: Tensor, index: Tensor) -> tuple[Tensor, Any]:
        """Mean of a value per image (B,) over the images of all processes, fillers (index -1) left out.

        Processes average their gradients, so each weights its sum by their number: the gradient is that of one
        process with the whole batch.

        Returns:
            The mean, and the number of images behind it, which weights the step in an epoch's log; it stays on the
            device.
        """
        real = index >= 0
        count = sum_of_all(real.sum())  # a strategy's reduce lets all processes wait for each other's GPUs first
        return (values * real).sum() * self.trainer.world_size / count, count

    def logged_sum(self, terms: dict[str, Tensor], count: Any) -> Tensor:
        """Sum of the loss terms of a step over ``count`` images, each logged by its name."""
        self.terms = tuple(terms)
        loss = torch.stack(list(terms.values())).sum()
        how: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": count}
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, **how)
        self.log("train/loss", loss, prog_bar=True, **how)
        return loss

    @override
    def on_train_start(self) -> None:
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        checks.require_to_go_on(self, steps, self._steps_per_epoch)
        self._steps_per_epoch = steps
        for loader in CombinedLoader(self.trainer.train_dataloader).flattened:
            if hasattr(loader, "loop"):  # a ResumableLoader, not a user's own
                loader.loop = self.trainer.fit_loop
        if self.steps_trained < self.trainer.current_epoch * steps:  # Lightning takes an epoch that was cut for done
            rank_zero_warn(
                f"The run to resume ended inside an epoch, after {self.steps_trained} steps of {steps} an epoch: the "
                "images that were left in it are passed over."
            )
        if not self.is_scored and validation_was_due(self.trainer, math.ceil(self.epochs_trained)):
            validate_now(self.trainer)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.steps_trained += 1
