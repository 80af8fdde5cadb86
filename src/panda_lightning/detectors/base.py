"""What every detector shares: scoring in validation, test and prediction, and the state that a run derives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from inspect import isabstract
from typing import Any
from uuid import uuid4

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from panda_lightning.arguments import Checked, Count, require
from panda_lightning.callbacks import Health, Media, Predictions, RebuildIndex, Report
from panda_lightning.callbacks.rebuild_index import validate_now
from panda_lightning.detectors import scoring
from panda_lightning.formulas import metrics
from panda_lightning.runtime.agreement import require_same
from panda_lightning.runtime.checkpoints import FORMAT, WholeCheckpointIO, require_format
from panda_lightning.runtime.derived import Derived, mapped
from panda_lightning.runtime.features import extract, gather
from panda_lightning.runtime.fingerprint import checksum
from panda_lightning.runtime.loggers import AutoWandbLogger, claim_folder
from panda_lightning.runtime.options import require_options
from panda_lightning.runtime.results import Calibration, Results
from panda_lightning.types import Batch, PandaError, Scores


class Detector(Checked, pl.LightningModule, ABC):
    """Scores images by how anomalous they are.

    A method overrides ``anomaly_score``; if it learns, ``training_step``, ``configure_optimizers`` and
    ``fresh_networks``; if it looks scores up in a bank of normal images, ``make_bank`` and ``fit_index``.

    What a run derives from weights and images is ``Derived``, and belongs to the ``origin`` that it was derived from.
    A run compares origins before it decodes an image (``accept``). A detector that was trained, or came from a
    checkpoint, keeps its state: other preprocessing, or another problem on the same data set, is refused. A bank
    that a test made by itself is made anew for other images, arguments or precision. ``fit`` without a checkpoint
    starts from fresh weights.

    Attributes:
        COMPUTING: Arguments that say how to compute, not what: they may differ from the checkpoint's.
        SCORING: Arguments that only scoring uses: they may be changed and nothing need be derived anew.
        OUTLIERS: Whether training batches hold outliers too.
        derived: What runs derived, by attribute; see Derived.
        origin: What it was derived from, see AnomalyDataModule.origin; None before any run.
        run_id: A name of the run that derived it, also after a resume.
        bank: What scores are looked up in; None where the method has none, and before it is made.
        bank_weights: Checksum of the weights it was made with.
        bank_names: What the normal images behind it are called.
        bank_changes: Names that were added to it since, and names that were taken out of it.
        held_out: Scores of the normal images that were held back (``calibration_fraction``), and what they are of.
        steps_trained: Optimiser steps behind the weights in use.
        terms: Names of the loss terms of the last training step.
    """

    COMPUTING = ("optimize", "index_backend", "index_memory_mb", "prefix_cache_gb", "prefix_cache_dir", "shard_bank")
    SCORING: tuple[str, ...] = ()
    OUTLIERS = False

    origin = Derived[dict[str, Any] | None](None)
    run_id = Derived[str]("")
    bank = Derived[Any](None)
    bank_weights = Derived[str]("")
    bank_names = Derived[list[str]]([])
    bank_changes = Derived[tuple[list[str], list[str]]](([], []))
    held_out = Derived[tuple[Tensor, list[Any]] | None](None)
    steps_trained = Derived[int](0)
    _steps_per_epoch = Derived[int](1)
    _steps_scored = Derived[int](0)  # steps_trained at the last validation
    _scored = Derived[tuple[Tensor, ...] | None](None)

    LISTED = 5  # nearest normal images that are named, or more where the score is made of more

    terms: tuple[str, ...] = ()
    maps = False  # whether prediction draws how a pooled distance is made up, where that can be told
    interpolation: str | None = None  # how the network wants images resized; None is no matter

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
        self._ready: tuple[list[Any], Any, Any, Calibration | None] | None = None  # see ready

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
        fitting, keeps = self.trainer.state.fn == "fit", self._keeps
        if self.learns and not fitting:
            self.require_learned()
        if fitting and not self._restored and self.trainer.global_step:
            raise PandaError(
                f"this Trainer has made {self.trainer.global_step} steps already: make a new one, with ckpt_path where "
                "training is to go on (Lightning would go on without the optimiser's state)."
            )
        now = {**data.origin(training=fitting or not keeps), "settings": self.settings}
        now["precision"] = str(self.trainer.precision)
        self._now = now
        if keeps and self.origin is not None:
            require_same(self.method, self.origin, now, fitting, self.learns)
            if self.precision != now["precision"]:
                rank_zero_info(f"Scores are computed in {self.precision}, as those of the checkpoint's own run.")
            if not fitting and now["normal training images"] not in (None, self.origin["normal training images"]):
                rank_zero_info(f"{self.method} keeps what it learned from {self.origin['data']}'s normal images.")
            return
        if self.origin != now:
            self.derived.clear()
            self._ready = None
            self.origin, self.run_id = now, self.trainer.strategy.broadcast(uuid4().hex[:8])
        if fitting and self._moved:
            rank_zero_info(f"{self.method} starts anew from fresh weights; ckpt_path goes on with trained ones.")
            self.start_anew()
        elif fitting:
            changing = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
            self._fresh = {name: t.detach().clone() for name, t in (*changing, *self.named_buffers())}

    def require_learned(self) -> None:
        """Refuse to score before anything was learned.

        Raises:
            PandaError: Saying what to do.
        """
        if self.learns and not self._keeps:
            raise PandaError(
                f"{self.method} is untrained, so it has no scores of its own: train it with fit, or give ckpt_path. "
                "DN2 scores by a pretrained network as it is."
            )
        if self.origin is None:
            raise PandaError(
                f"{self.method} knows no normal images yet: test it once with a data set, or load a checkpoint with "
                f"{type(self).__name__}.load_from_checkpoint."
            )

    def ready(self) -> Calibration | None:
        """Make the bank searchable without a run; once, unless weights, bank, arguments or device change.

        Returns:
            The calibration, None where there is none.

        Raises:
            PandaError: If there is no bank for these weights.
        """
        tensors = [(t.data_ptr(), t._version) for t in (*self.parameters(), *self.buffers())]
        state, before = [tensors, self._arguments(), str(self.device)], self._ready
        alike = before is not None and before[0] == state
        if before is None or not (alike and before[1] is self.bank and before[2] is self.held_out):
            if type(self).make_bank is not Detector.make_bank:
                if not self.bank_is_fresh:
                    raise PandaError(
                        f"{self.method} has no bank of normal images for its weights: test it with the data set, or "
                        "load a checkpoint of an epoch's end."
                    )
                self.fit_index()  # the bank is on this device now
            before = self._ready = (state, self.bank, self.held_out, self.calibration)
        return before[3]

    def start_anew(self) -> None:
        """Give the networks the weights that they had before training."""
        if self._fresh is None:
            for name, network in self.fresh_networks().items():
                getattr(self, name).load_state_dict(network.state_dict())
        else:
            own = self._own_tensors()
            with torch.no_grad():
                for name, value in self._fresh.items():
                    own[name].copy_(value)
        self._moved = False

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments as they are now, but for those that change nothing that is derived."""
        free = (*self.COMPUTING, *self.SCORING, "backbone", "weights")  # weights are compared themselves
        return {name: value for name, value in self._arguments().items() if name not in free}

    def _arguments(self) -> dict[str, Any]:
        """The constructor's arguments; attributes of their names may have been changed since."""
        found = {}
        for name, given in self.hparams.items():
            own = getattr(self, name, given)
            plain = own is None or isinstance(own, str | int | float | list | tuple)
            found[name] = own if plain and not isinstance(getattr(type(self), name, None), Derived) else given
        return found

    @property
    def _kind(self) -> str:
        """The class whose state this is: where a user's own adds to a method of this package, that method's."""
        ours = (c for c in type(self).__mro__ if c.__module__.startswith(__package__) and not isabstract(c))
        return next(ours, type(self)).__name__

    def whole(self) -> dict[str, Any]:
        """``derived`` with what other processes hold of it; every process must call it."""
        return dict(self.derived)

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` holds beside weights: plain tensors on the CPU, and primitives."""
        derived = mapped(self.whole(), lambda tensor: tensor.cpu())
        return {"format": FORMAT, "detector": self._kind, "derived": derived}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint or another process derived; comes before weights are loaded."""
        if state["detector"] != self._kind:
            raise PandaError(
                f"the checkpoint is one of {state['detector']}, not of {self._kind}: take that class, or name the "
                "checkpoint as backbone to use its network."
            )
        self.derived, self._given, self._moved = dict(state["derived"]), True, False

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # the command line, which reads the class there, has written it already where it made this object
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint.get("hyper_parameters", {}).setdefault("_class_path", name)
        checkpoint.get("hyper_parameters", {}).update(self._arguments())
        state = checkpoint["state_dict"]
        if state["_extra_state"]["derived"].get("run_id") != self.run_id:  # weights averaged by a copy of this object
            state["_extra_state"] = self.get_extra_state()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_format(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit" and "optimizer_states" not in checkpoint:
            raise PandaError(
                "the checkpoint holds weights alone (save_weights_only, or a test saved it), so no training can go on "
                "from it: test it, or start anew."
            )
        self._restored = True

    # ---- a bank ----------------------------------------------------------------------------------------------------

    def make_bank(self) -> Any:
        """Make of the normal training images, with the weights of this moment, what scores are looked up in."""
        raise NotImplementedError

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
        what = "normal training images"
        if self.origin is not None and self._now.get(what) != self.origin[what]:
            here = "are missing" if self._now.get(what) is None else "are others"
            raise PandaError(
                f"{self.method} has no bank for its weights (it was saved between two validations), and the {what} "
                f"that it learned from {here} here: give those, or a checkpoint of an epoch's end."
            )
        with scoring.computed_as(self):
            self.bank, self.bank_weights = self.make_bank(), self._weights()
        shown: Any = getattr(self.data.normal_dataloader(), "dataset", None)  # a user's own may have no names
        self.bank_names = shown.images.paths() if hasattr(shown, "images") else []

    # ---- a calibration ---------------------------------------------------------------------------------------------

    @property
    def scored_by(self) -> list[Any]:
        """What scores depend on besides the image."""
        return [self._weights(), {name: getattr(self, name) for name in self.SCORING}, self.precision]

    @property
    def precision(self) -> str:
        """In which scores are computed: the run's; of what is kept, and without a run, that of its origin.

        A Trainer that asks for nothing (32-true) tests and predicts as the origin was computed, where that was mixed.
        """
        running = self._trainer is not None and self.trainer.state.status == "running"
        asked = str(self.trainer.precision) if running else "32-true"
        own = running and (self.trainer.state.fn == "fit" or not (self._keeps or self.trainer.state.fn == "predict"))
        if self.origin is None or own or asked != "32-true":
            return asked
        before = str(self.origin["precision"])
        return before if before.endswith("mixed") else "32-true"

    def hold_out(self) -> None:
        """Score the images that were held back, with the weights and the bank of this moment."""
        if not getattr(self.data, "calibration_fraction", 0) or self.trainer.sanity_checking:
            return
        if self._keeps and self.trainer.state.fn != "fit":
            return  # these are not the images that were held back from it
        if self.held_out is not None and self.held_out[1] == self.scored_by:
            return
        scores = self.scores_of(self.data.calibration_dataloader(), "Calibration")
        self.held_out = (scores.cpu(), self.scored_by)

    def scores_of(self, loader: Any, title: str) -> Tensor:
        """Scores (N,) of all images of a loader, float64; every process must call it."""
        return extract(self.trainer, self.anomaly_score, loader, title, dtype=torch.float64, finish=self.all_scored)

    def join_bank(self, rows: Tensor) -> None:
        """Add to the bank what ``embed`` makes of normal images (N, ...); see detectors/banks.py."""
        assert isinstance(self.bank, Tensor)  # banks.names has asked
        self.bank = torch.cat([self.bank, rows.to(self.bank)])

    def leave_bank(self, kept: Tensor) -> None:
        """Leave those of the bank's images (N,) that are False out of it.

        Raises:
            PandaError: If what is left does not do.
        """
        assert isinstance(self.bank, Tensor)  # banks.names has asked
        if not kept.any():
            raise PandaError(f"none of the {len(kept)} normal images would be left: keep some.")
        self.bank = self.bank[kept]

    def held_back(self, rows: Tensor) -> Tensor:
        """Which rows (N, ...) of ``embed`` are of images that p-values rest on, as far as that is known: (N,)."""
        return torch.zeros(len(rows), dtype=torch.bool)

    def recalibrate(self) -> None:
        """Score the images that were held back anew, after the bank has changed; or forget their scores."""
        self.held_out = None

    def leave_one_out(self) -> Tensor | None:
        """Scores of the bank's own images (N,), each without itself; None where they cannot be told."""
        return None

    @property
    def calibration(self) -> Calibration | None:
        """What p-values rest on: scores of images held back, or for a method that trains nothing, leave-one-out's.

        Of a network that was adapted to them, the scores of the bank's images are too low (experiments/RESULTS.md).
        """
        if self.held_out is not None:
            scores, made_from = self.held_out
            if made_from == self.scored_by:
                return Calibration(scores.double().numpy(), "held out")
            rank_zero_warn(
                f"There are no p-values: {', '.join((*self.SCORING, 'precision'))} or weights are others than when the "
                "calibration images were scored."
            )
            return None
        others = None if self.learns else self.leave_one_out()
        return None if others is None else Calibration(others.double().cpu().numpy(), "leave one out")

    # ---- a run -----------------------------------------------------------------------------------------------------

    def load_networks(self) -> None:
        """Load what a run needs from elsewhere; what cannot be had is said before there is a log."""

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        # The first hook of every run: what cannot work is said here, before data are fetched.
        if self.trainer.state.fn == "fit" and not self.learns:
            raise PandaError(
                f"{self.method} has nothing to train: run `lightning test` with the same arguments, "
                "which builds its bank and saves it in last.ckpt."
            )
        for name, hint in (("accumulate_grad_batches", Count), ("check_val_every_n_epoch", Count | None)):
            require(f"trainer.{name}", getattr(self.trainer, name), hint)
        require_options(self.trainer)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no plugin of the user's
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        self.load_networks()
        for logger in self.trainer.loggers:
            if self.trainer.is_global_zero:
                claim_folder(logger)
            if isinstance(logger, AutoWandbLogger):
                run = {
                    key: getattr(self.trainer, key) for key in ("max_epochs", "max_steps", "world_size", "precision")
                }
                if size := getattr(self.data, "batch_size", None):
                    run |= {"batch_size": size, "batch_size_per_process": size // self.trainer.world_size}
                logger.describe(type(self.data).__name__, self.method, run)
        banks = [RebuildIndex()] if type(self).make_bank is not Detector.make_bank else []
        own = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [*banks, Health(), Media(), *(kind() for kind in (Report, Predictions) if kind not in own)]

    @override
    def setup(self, stage: str) -> None:
        self._restored, self._now = False, {}
        self._widen()  # a run that an error ended has not come to its teardown
        if stage == "fit":  # a checkpoint, if there is one, comes later
            self._moved |= self.steps_trained > 0
            self.derived.clear()
            self._given = False
            self.train()  # Lightning leaves a module in eval mode after predict, and BatchNorm would then not learn
        if str(self.trainer.precision) in ("16-true", "bf16-true"):  # Lightning narrows the weights, for good
            if stage == "fit":
                rank_zero_warn(
                    f"precision {self.trainer.precision} keeps the weights themselves in half precision, which loses "
                    "small steps: bf16-mixed trains as float32 does."
                )
            self._wide = {} if stage == "fit" else {name: t.clone() for name, t in self._own_tensors().items()}
        data = self.data
        if stage != "predict" and not hasattr(data, "normal_dataloader"):
            raise PandaError(
                f"{self.method} needs a data module with normal_dataloader(), which gives the normal training images "
                f"in order; got {type(data).__name__}. ImageFolder serves any folder of images."
            )
        held = stage == "fit" and bool(getattr(data, "calibration_fraction", 0))
        if held and not self.trainer.limit_val_batches and type(self).make_bank is Detector.make_bank:
            raise PandaError(
                f"data.calibration_fraction={data.calibration_fraction:g} holds images back, which {self.method} "
                "scores in validations: leave trainer.limit_val_batches=0 out."
            )
        if stage == "fit" and getattr(data, "outliers", None) and not self.OUTLIERS:
            raise PandaError(
                f"data.outliers={data.outliers} would be ignored, for {self.method} learns from normal images alone: "
                "leave it out, or take --model PANDAOE."
            )

    @override
    def teardown(self, stage: str) -> None:
        self._widen()

    def _widen(self) -> None:
        """After a run in half precision: trained weights as they are, others as they were before it."""
        if self._wide is not None:
            self.float()
            own = self._own_tensors()
            for name, value in self._wide.items():
                own[name].data = value.to(self.device)
            self._wide = None

    def _own_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        with scoring.computed_as(self):
            return {"index": batch["index"], **self.explained(batch)}

    @override
    def on_predict_epoch_end(self) -> None:
        self.all_scored()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        with scoring.computed_as(self):
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
            kind = "anomalous" if scores.label.any() else "normal"
            why = f"the {len(scores.label)} images scored are all {kind}" if len(scores.label) else "nothing is scored"
            rank_zero_warn(f"There is no {name}: {why}.")
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if getattr(callback, "monitor", None) == name:
                    raise PandaError(
                        f"{type(callback).__name__} waits for {name}, and {why}: leave monitor={name} out."
                    )
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
        count = self.trainer.strategy.reduce(real.sum(), reduce_op="sum")
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
        if self.trainer.global_step != self.steps_trained:  # so it is with a used Trainer, too
            raise PandaError(
                f"the checkpoint's weights have {self.steps_trained} steps behind them, but it was saved by a Trainer "
                f"with {self.trainer.global_step} (after a test, say): it can be tested, not trained on."
            )
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        if self.steps_trained and steps != self._steps_per_epoch:
            raise PandaError(
                f"an epoch has {steps} steps here, but {self._steps_per_epoch} in the run that is to go on: give the "
                "same data, batch size and Trainer options, or start anew."
            )
        self._steps_per_epoch = steps
        epochs, rest = divmod(self.steps_trained, self._steps_per_epoch)
        due = not rest and epochs % (self.trainer.check_val_every_n_epoch or 1) == 0
        if due and self.trainer.enable_validation and not self.is_scored:
            # the checkpoint is of an epoch's last step, and Lightning takes that epoch's validation for done
            validate_now(self.trainer)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.steps_trained += 1
