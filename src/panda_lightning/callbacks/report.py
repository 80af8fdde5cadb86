"""What a person looks at when a run ends: a table, and report.png."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from rich import box, get_console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from panda_lightning.formulas.metrics import auroc
from panda_lightning.runtime.loggers import from_here
from panda_lightning.runtime.whole import new_file

Row = dict[str, float]

FORMATS = {"epochs_trained": "{:g}", "val": "{:.5f}", "train": "{:.4g}", "seconds": "{:.1f}"}  # by a key's first part
LOGGED = ("epochs_trained", "val", "train", "features")  # of a row, what loggers have too
KEPT = ("epochs", "features/")  # of what a validation logs, beside its AUROC
HEADINGS = {
    "epochs_trained": "epochs",
    "val/auroc": "AUROC",
    "val/auroc_ses": "AUROC SES",
    "val/auroc_oracle": "AUROC oracle",
    "val/auroc_autoencoder": "AUROC autoencoder",
    "train/ewc": "EWC",
    "seconds/train": "train s",
    "seconds/bank": "bank s",
    "seconds/score": "score s",
}


class Report(pl.Callback):
    """Keeps a row a validation of ``fit``; at the end of a run prints what came out, and draws it as report.png.

    The rows travel in the checkpoint, so a resumed run reports the whole curve, also in its ``metrics.csv``.

    Args:
        pictures: Whether to draw.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        self.rows: list[Row] = []
        self._scored = False  # in this run
        self._train_seconds = 0.0
        self._clock = time.perf_counter()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"] if self._fitting else []

    def _lap(self) -> float:
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._fitting = stage == "fit"
        # a Trainer that is used again keeps its callbacks
        self.rows, self._scored, self._train_seconds = [], False, 0.0
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes, so not at the end

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for logger in trainer.loggers if self.rows else ():  # also where no step is left to do
            if isinstance(logger, CSVLogger):  # W&B has the earlier rows in its own run
                for row in self.rows:
                    shown: dict[str, Tensor | float] = {
                        key: torch.tensor(v) for key, v in row.items() if key.split("/")[0] in LOGGED
                    }
                    logger.log_metrics(shown, step=int(row["step"]))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._lap()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._train_seconds = self._lap()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        self._scored = True
        if not self._fitting:
            return
        seconds, metrics = self._lap(), trainer.callback_metrics
        mine = (f"val/{pl_module.auroc_name}", "val/auroc_ses")  # the autoencoder's is an earlier epoch's
        row = {name: float(v) for name, v in metrics.items() if name in mine or name.startswith(KEPT)}
        row.pop("features/ewc_share", None)  # the last epoch's: that of this one is known at its end
        row["step"] = float(trainer.global_step)
        if row["epochs_trained"]:
            row["seconds/train"] = self._train_seconds
        if "bank/seconds" in metrics:
            row["seconds/bank"] = float(metrics["bank/seconds"])
        row["seconds/score"] = seconds - row.get("seconds/bank", 0.0)
        self.rows.append(row)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._scored = True

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.rows and self.rows[-1]["epochs_trained"] == pl_module.epochs_trained:
            terms = {f"train/{n}": float(trainer.callback_metrics[f"train/{n}"]) for n in pl_module.terms}
            self.rows[-1] |= terms
            if "train/ewc" in terms:
                self.rows[-1]["features/ewc_share"] = terms["train/ewc"] / max(sum(terms.values()), 1e-30)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._finish(trainer, pl_module)  # now, when the progress bar no longer draws

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._scored:  # else there is nothing yet but what a checkpoint brought
            self._finish(trainer, pl_module)
        for folder in filter(None, (logger.log_dir for logger in trainer.loggers)):
            with suppress(OSError):  # only where nothing is in it yet
                Path(folder).rmdir()

    @rank_zero_only
    def _finish(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not (self.rows or self._scored) or pl_module.scores is None:
            return
        console = get_console()
        name = pl_module.auroc_name.replace("auroc", "AUROC").replace("_", ", ")
        scores, labels = pl_module.scores.score, pl_module.scores.label
        if self.rows:
            console.print(_table(self.rows, f"{type(pl_module.data).__name__}, {pl_module.method}"))
        key = f"val/{pl_module.auroc_name}"
        rows = [row for row in self.rows if key in row]  # Deep SVDD's autoencoder has another
        if not pl_module.scores.both:
            line = f"No {name}: {len(scores)} images scored, none of them {'normal' if labels.any() else 'anomalous'}"
        elif rows:
            first, last, best = rows[0], rows[-1], max(rows, key=lambda row: row[key])
            line = (
                f"{name} {last[key]:.4f} after {last['epochs_trained']:g} epochs, "
                f"{first[key]:.4f} after {first['epochs_trained']:g} "
                f"(best epoch by test labels, oracle: {best[key]:.4f})"
            )
        else:
            line = f"{name} {auroc(scores, labels):.4f} of {len(scores)} images by {pl_module.method}"
        console.print(line, soft_wrap=True)
        if len(scores) and self.pictures:
            draw(self._folder / "report.png", scores, labels, self.rows, name, headline(pl_module))
            console.print(f"Pictures: {from_here(self._folder / 'report.png')}", soft_wrap=True)
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if path and trainer.state.fn == "fit":
            console.print(f"Checkpoint: {from_here(path)}", soft_wrap=True)


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    kinds = list(FORMATS)
    known = dict.fromkeys(key for row in reversed(rows) for key in row if key.split("/")[0] in kinds)
    keys = sorted(known, key=lambda key: kinds.index(key.split("/")[0]))
    for key in keys:
        table.add_column(HEADINGS.get(key, key.split("/")[-1].replace("_", " ")), justify="right")
    for row in rows:
        table.add_row(*(FORMATS[key.split("/")[0]].format(row[key]) if key in row else "" for key in keys))
    return table


def headline(detector: Any) -> str:
    """What a picture is of: data set, normal class, method and network."""
    network = str(detector.hparams.get("backbone") or "")
    network = Path(network).name if network.endswith(".ckpt") or network.startswith("local-dir:") else network
    problem = detector.data.problem
    named = f"{'anomalous' if problem['protocol'] == 'leave_one_out' else 'normal'}: {problem['normal_class']}"
    parts = [type(detector.data).__name__, problem.get("category"), named, detector.method, network]
    return ", ".join(filter(None, parts))


def draw(path: Path, scores: Tensor, labels: Tensor, rows: list[Row], name: str = "AUROC", title: str = "") -> None:
    """Draw report.png.

    Args:
        path: The picture's file.
        scores: (N,), higher is more anomalous.
        labels: (N,), 1 = anomalous.
        rows: What Report keeps; two or more give a third panel, AUROC over epochs.
        name: What AUROC is called.
        title: See headline.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    both = 0 < labels.sum() < len(labels)
    curve = [(row["epochs_trained"], row["val/auroc"]) for row in rows if "val/auroc" in row]
    curves = both and len(curve) > 1
    told = {key for row in rows for key in row if key.startswith("features/")} if len(rows) > 1 else set()
    panels = 1 + int(both) + int(curves) + int(bool(told))  # scores, ROC curve, AUROC over epochs, features
    figure = Figure(figsize=(1 + 4 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    low, high = (
        float(scores.min()),
        float(np.quantile(scores, 0.995)),
    )  # a few far outliers would squeeze the rest
    bins = np.linspace(low, max(high, low + 1e-12), 41)
    for label, kind, colour in ((0, "normal", "tab:blue"), (1, "anomalous", "tab:red")):
        part = scores[labels == label].numpy()
        if not len(part):
            continue
        axes[0].hist(
            part.clip(max=bins[-1]),
            bins,
            density=True,
            alpha=0.55,
            color=colour,
            label=f"{kind} ({len(part)})",
        )
    axes[0].set(title="Anomaly scores of the test images", xlabel="score", ylabel="density")
    axes[0].margins(y=0.25)  # room for the legend
    axes[0].legend()
    if both:
        false, true, _ = roc_curve(labels, scores)
        axes[1].plot(false, true, color="tab:green", label=f"{name} {auroc(scores, labels):.4f}")
        axes[1].legend(loc="lower right")
        axes[1].plot([0, 1], [0, 1], ":", color="grey")
        axes[1].set(title="ROC", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    if curves:
        axes[2].plot(*zip(*curve, strict=True), "o-", markersize=3)
        axes[2].set(
            title=f"AUROC over training{' (0 = untrained)' if not curve[0][0] else ''}",
            xlabel="epochs trained",
            ylabel="AUROC",
        )
        axes[2].set_ylim(top=min(axes[2].get_ylim()[1], 1.0005))  # there is nothing above 1
        axes[2].grid(alpha=0.3)
    if told:
        _draw_features(axes[-1], rows, sorted(told))
    with new_file(path) as new:
        figure.savefig(new, dpi=110, format="png")


def _draw_features(axes: Any, rows: list[Row], keys: list[str]) -> None:
    """Draw what FeatureHealth logs, each relative to its first value but for shares."""
    for key in keys:
        shown = [(row["epochs_trained"], row[key]) for row in rows if key in row]
        first = shown[0][1] or 1.0
        scale = 1.0 if key.endswith(("kept", "share")) else first
        name = key.split("/")[1].replace("_", " ")
        axes.plot(*zip(*((x, y / scale) for x, y in shown), strict=True), ".-", label=name)
    axes.set(title="Features of the normal images (before = 1)", xlabel="epochs trained")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
