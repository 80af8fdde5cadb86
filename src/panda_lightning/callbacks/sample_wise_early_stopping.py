"""PANDA-SES: each image is scored at the time of training that shows it as most anomalous."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.func import functional_call
from typing_extensions import override

from panda_lightning.arguments import Checked
from panda_lightning.formulas.metrics import auroc
from panda_lightning.runtime.checkpoints import checkpoint_folder, read_tensors
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.sizes import in_words
from panda_lightning.types import Batch, PandaError, Scores


class SampleWiseEarlyStopping(Checked, pl.Callback):
    r"""Keeps each test image's largest score over the validations of ``fit``, in units of the normal images' score.

    .. math:: s(x) = \max_t \frac{s_t(x)}{\frac1N \sum_n s_t(x_n)}

    t runs over all validations, including that of the untrained network. The mean is over the normal training images;
    no image is its own neighbour ("PANDA-SES" in the paper). No labels are used. ``fit`` keeps only scores and logs
    ``val/auroc_ses``, the AUROC of SES so far, besides ``val/auroc`` of the current epoch.

    Args:
        keep_snapshots: Save the adapted layers and the bank of each validation next to the checkpoint, so that ``test``
            and ``predict`` can score new images by SES (``test/auroc_ses``, and ``ses_score`` in predictions).
    """

    def __init__(self, keep_snapshots: bool = False) -> None:
        self.keep_snapshots = keep_snapshots
        self.score: Tensor | None = None  # (N,) of the test images, so far
        self.kept: list[int] = []  # steps trained at each snapshot
        self._adapted: dict[str, Tensor] = {}  # of the validation under way
        self._snapshots: list[tuple[dict[str, Tensor], Any, float]] = []
        self._parts: list[tuple[Tensor, ...]] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "kept": self.kept}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.kept = state_dict["score"], state_dict["kept"]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.steps_trained == 0:
            self.score, self.kept = None, []
        elif self.score is None:
            raise PandaError(
                "SES needs the scores of every validation, but the run to resume was started without it: start "
                "a new run, or leave SampleWiseEarlyStopping out of the callbacks."
            )
        if not hasattr(pl_module, "normal_score"):
            raise PandaError(
                f"SES needs a detector with a bank of features, but {pl_module.method} has none: leave "
                "SampleWiseEarlyStopping out of the callbacks."
            )
        if self.keep_snapshots and trainer.ckpt_path:
            self._bring_along(trainer, pl_module)

    def _bring_along(self, trainer: pl.Trainer, detector: Any) -> None:
        """Let the networks of earlier times, which lie beside the checkpoint, lie beside the new ones too."""
        here, there = checkpoint_folder(trainer), Path(str(trainer.ckpt_path)).parent
        missing = []
        for steps in self.kept if trainer.is_global_zero else ():
            old, new = (_snapshot(folder, detector.run_id, steps) for folder in (there, here))
            if new.is_file():
                continue
            if not old.is_file():
                missing.append(str(old))
                continue
            new.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old, new)  # takes no room
            except OSError:
                shutil.copyfile(old, new)
        if missing := trainer.strategy.broadcast(missing):
            raise PandaError(
                f"SES saved its networks beside the checkpoint to resume from, but {missing[0]} is missing: set "
                "keep_snapshots to false, or start a new run."
            )

    # ---- fit: scores alone ---------------------------------------------------------------------------------------

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.keep_snapshots and batch_idx == 0 and trainer.state.fn == "fit":
            # now, with the weights that score: averages may be taken back before this callback's epoch end
            self._adapted = {name: p.detach().cpu().clone() for name, p in pl_module.backbone.trained().items()}

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        scores, normal = pl_module.merged_scores(), pl_module.normal_score()
        ses = self.follow(scores.score, normal)
        if scores.both:
            pl_module.log("val/auroc_ses", torch.tensor(auroc(ses, scores.label), dtype=torch.float64))
        if self.keep_snapshots:
            self._keep(trainer, pl_module, normal)

    def follow(self, score: Tensor, normal: float) -> Tensor:
        """Add a validation: scores (N,) of the test images, and the mean of the normal ones; returns SES so far."""
        if normal == 0:
            raise PandaError("the normal training images are alike to the network, so SES has no unit: leave it out.")
        relative = score / normal
        self.score = relative if self.score is None else torch.maximum(self.score, relative)
        return self.score

    def _keep(self, trainer: pl.Trainer, detector: Any, normal: float) -> None:
        steps = detector.steps_trained
        path = _snapshot(checkpoint_folder(trainer), detector.run_id, steps)
        adapted, self._adapted = self._adapted, {}
        entries = detector.index.whole(detector.entries())
        if steps == 0:
            one = sum(t.numel() * t.element_size() for t in (entries, *adapted.values()))
            times = "" if trainer.max_epochs in (None, -1) else f", {in_words(one * (trainer.max_epochs + 1))} in all"
            rank_zero_info(f"SES saves {in_words(one)} at each validation{times}, in {path.parent}")
        how = [detector.k, detector.normalize]
        kept = {"adapted": adapted, "entries": entries, "normal_score": normal, "how": how}
        trainer.strategy.save_checkpoint(kept, path)
        self.kept = [*(n for n in self.kept if n < steps), steps]

    # ---- test and predict: the networks of all times -------------------------------------------------------------

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.load(pl_module, trainer.ckpt_path)
        self._parts = []

    on_predict_start = on_test_start

    def load(self, detector: Any, path: Any, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Load the networks and banks of all kept times, for ``scores``.

        Args:
            detector: From the checkpoint.
            path: Of the checkpoint, beside which they lie; None where there is none.
            keep: What to keep of weights and banks.

        Raises:
            PandaError: If they are not there, or were kept with other arguments.
        """
        folder = Path(str(path)).parent if path else None
        paths = [_snapshot(folder, detector.run_id, steps) for steps in self.kept] if folder else []
        missing = [path for path in paths if not path.is_file()]
        if not paths or missing:
            raise PandaError(
                "SES scores new images with the networks saved at every validation, but "
                + (f"{missing[0]} is missing" if missing else f"there are none {_of(path)}")
                + ": train with keep_snapshots: true, or leave SampleWiseEarlyStopping out of the callbacks."
            )
        self._snapshots = []
        for one in paths:
            kept = read_tensors(one, detector.device)
            if kept["how"] != [detector.k, detector.normalize]:
                raise PandaError(
                    f"SES saved its networks with k, normalize = {kept['how']}, but now they are "
                    f"{[detector.k, detector.normalize]}: use the saved values."
                )
            adapted = {f"model.{name}": keep(p) for name, p in kept["adapted"].items()}
            self._snapshots.append((adapted, detector.index.empty().fit(keep(kept["entries"])), kept["normal_score"]))

    def scores(self, detector: Any, batch: Batch) -> Tensor:
        """SES (B,) of images, by the times that were loaded."""
        hidden = detector.backbone.prefix(batch["image"])
        found = []
        for adapted, index, normal in self._snapshots:
            weights = {name: p.float() for name, p in adapted.items()}
            features = functional_call(detector.backbone, weights, (hidden,)).float()
            distances, _ = index.search(detector.scoring_space(features), detector.k)
            found.append(distances.sum(dim=1) / normal)
        return torch.stack(found).amax(dim=0)

    @override
    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._parts.append((batch["index"], self.scores(pl_module, batch), batch["label"]))

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = Scores(*gather(self._parts))
        if found.both:
            pl_module.log("test/auroc_ses", torch.tensor(auroc(found.score, found.label), dtype=torch.float64))

    @override
    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        outputs["ses_score"] = self.scores(pl_module, batch)


def _snapshot(folder: Path, run: str, steps: int) -> Path:
    """The file of one time of a run, beside its checkpoints."""
    return folder / "ses" / run / f"{steps:08d}.ckpt"


def _of(path: Any) -> str:
    return f"of {path}" if path else "without ckpt_path"
