"""What a person looks at when a run ends: a table, and report.png."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only
from rich import box, get_console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from panda_lightning.metrics import auroc

Row = dict[str, float]

COLUMNS = {  # key of a row: heading, format
    "epochs_trained": ("epochs", "{:g}"),
    "val/auroc": ("AUROC", "{:.5f}"),
    "val/auroc_ses": ("AUROC SES", "{:.5f}"),
    "train/compactness": ("compactness", "{:.4g}"),
    "train/ewc": ("EWC", "{:.3g}"),
    "seconds/train": ("train s", "{:.1f}"),
    "seconds/bank": ("bank s", "{:.1f}"),
    "seconds/score": ("score s", "{:.1f}"),
}


class Report(pl.Callback):
    """Keeps a row a validation; at the end prints them and draws scores, ROC curve and AUROC over epochs.

    The rows travel in the checkpoint, so a resumed run reports the whole curve.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._train_seconds = 0.0
        self._clock = time.perf_counter()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def _lap(self) -> float:
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    @override
    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes, so not at the end

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
        seconds, metrics = self._lap(), trainer.callback_metrics
        known = ("epochs_trained", "val/auroc", "val/auroc_ses")
        row = {name: float(metrics[name]) for name in known if name in metrics}
        row["seconds/bank"] = float(metrics.get("bank/seconds", 0.0))
        row["seconds/score"] = seconds - row["seconds/bank"]
        if row["epochs_trained"]:
            row["seconds/train"] = self._train_seconds
        self.rows.append(row)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.rows and self.rows[-1]["epochs_trained"] == pl_module.epochs_trained:
            metrics = trainer.callback_metrics
            self.rows[-1] |= {n: float(metrics[n]) for n in ("train/compactness", "train/ewc") if n in metrics}

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._finish(trainer, pl_module)  # now, when the progress bar no longer draws

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._finish(trainer, pl_module)

    @rank_zero_only
    def _finish(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.scores is None:
            return
        console = get_console()
        if self.rows:
            console.print(_table(self.rows, f"{type(pl_module.data).__name__}, {pl_module.method}"))
            first, last = self.rows[0], self.rows[-1]
            best = max(self.rows, key=lambda row: row["val/auroc"])
            console.print(
                f"AUROC {last['val/auroc']:.4f} after {last['epochs_trained']:g} epochs, "
                f"{first['val/auroc']:.4f} after {first['epochs_trained']:g} "
                f"(best epoch by test labels, oracle: {best['val/auroc']:.4f})",
                soft_wrap=True,
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        draw(self._folder / "report.png", pl_module.scores.score, pl_module.scores.label, self.rows)
        console.print(f"Pictures: {self._folder / 'report.png'}", soft_wrap=True)
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if path and trainer.state.fn == "fit":
            console.print(f"Checkpoint: {path}", soft_wrap=True)


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(form.format(row[key]) if key in row else "" for key, (_, form) in columns.items()))
    return table


def draw(path: Path, scores: Tensor, labels: Tensor, rows: list[Row]) -> None:
    """Draw report.png.

    Args:
        path: The picture's file.
        scores: (N,), higher is more anomalous.
        labels: (N,), 1 = anomalous.
        rows: What Report keeps; two or more give a third panel, AUROC over epochs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(13 if len(rows) > 1 else 9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if len(rows) > 1 else 2)
    both = 0 < labels.sum() < len(labels)
    low, high = (
        float(scores.min()),
        float(np.quantile(scores, 0.995)),
    )  # a few far outliers would squeeze the rest
    bins = np.linspace(low, max(high, low + 1e-12), 41)
    for label, name, colour in ((0, "normal", "tab:blue"), (1, "anomalous", "tab:red")):
        part = scores[labels == label].numpy()
        axes[0].hist(
            part.clip(max=bins[-1]),
            bins,
            density=True,
            alpha=0.55,
            color=colour,
            label=f"{name} ({len(part)})",
        )
    axes[0].set(title="Anomaly scores of the test images", xlabel="score", ylabel="density")
    axes[0].margins(y=0.25)  # room for the legend
    axes[0].legend()
    if both:
        false, true, _ = roc_curve(labels, scores)
        axes[1].plot(false, true, color="tab:green", label=f"AUROC {auroc(scores, labels):.4f}")
        axes[1].legend(loc="lower right")
    axes[1].plot([0, 1], [0, 1], ":", color="grey")
    axes[1].set(title="ROC", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    if len(rows) > 1:
        axes[2].plot(*zip(*((r["epochs_trained"], r["val/auroc"]) for r in rows), strict=True), "o-", markersize=3)
        axes[2].set(title="AUROC over training (0 = DN2)", xlabel="epochs trained", ylabel="AUROC")
        axes[2].set_ylim(top=min(axes[2].get_ylim()[1], 1.0005))  # there is nothing above 1
        axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=110)
