"""Rows of a table that differ in how images are scored, and not in training: one run scores for all of them."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from panda_lightning.callbacks import SampleWiseEarlyStopping
from panda_lightning.detectors import precision
from panda_lightning.formulas.metrics import auroc
from panda_lightning.runtime.gathering import gather
from panda_lightning.types import Batch, Scores


class OtherScorings(pl.Callback):
    """Scores the test images of each validation of ``fit`` also with other values of ``normalize``.

    What comes out is that of a run with this value. A run that goes on without having scored so before leaves them out.

    Args:
        normalize: By a name.

    Attributes:
        found: By name the curve, (epochs trained, AUROC) of each validation, and the scores of the last one.
        seconds: What they took, with the parts before the run went on.
    """

    def __init__(self, normalize: Mapping[str, bool]) -> None:
        self.normalize = normalize
        self.found: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self._parts: dict[str, list[tuple[Tensor, ...]]] = {}
        self._indices: dict[str, Any] = {}
        self._features: Tensor | None = None  # of the batch that the detector has just scored
        self._hook: Any = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found = {name: known for name, known in state_dict["found"].items() if name in self.normalize}
        self.seconds = state_dict["seconds"]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.steps_trained == 0:
            self.found = {name: {"curve": []} for name in self.normalize}
        self._hook = pl_module.backbone.register_forward_hook(self._passed)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _passed(self, backbone: Any, images: Any, features: Tensor) -> None:
        if not torch.is_grad_enabled():
            self._features = features

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        names = () if trainer.sanity_checking else self.found
        self._parts, self._indices = {name: [] for name in names}, {}

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        begin = time.monotonic()
        assert self._features is not None
        with trainer.precision_plugin.val_step_context(), precision.computed_as(pl_module):
            for name, parts in self._parts.items():
                with self._scoring(pl_module, name):
                    score = pl_module.distances_of(self._features.float())
                parts.append((batch["index"], score, batch["label"]))
        self._features = None
        self.seconds += time.monotonic() - begin

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        begin = time.monotonic()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        chosen = any(isinstance(callback, SampleWiseEarlyStopping) for callback in callbacks)
        for name, parts in self._parts.items():
            scores, known = Scores(*(column.cpu() for column in gather(parts))), self.found[name]
            if chosen:
                ses = SampleWiseEarlyStopping()
                ses.score = known.get("score")
                with self._scoring(pl_module, name):
                    scores = Scores(scores.index, ses.follow(scores.score, pl_module.normal_score()), scores.label)
            if scores.both:
                known["curve"].append((pl_module.epochs_trained, auroc(scores.score, scores.label)))
            known["score"] = scores.score
        self._indices = {}
        self.seconds += time.monotonic() - begin

    @contextmanager
    def _scoring(self, detector: Any, name: str) -> Iterator[None]:
        """The detector as one that has this value from the start."""
        before = detector.normalize, detector.index, detector.reduction
        detector.normalize = self.normalize[name]
        try:
            if name not in self._indices:
                self._indices[name] = detector.index.empty().fit(detector.entries())
            detector.index = self._indices[name]
            yield
        finally:
            detector.normalize, detector.index, detector.reduction = before
