"""The table as a run of Weights & Biases."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.runtime.loggers import AutoWandbLogger
from panda_lightning.tables.summary import Summary

# Of a method's summary, beside its mean: what the table of means shows, as formats.COLUMNS calls it.
SHOWN = {
    "runs": "runs", "planned": "planned", "seeds": "seeds", "sd": "sd", "average_precision": "average_precision",
    "fpr_at_95_tpr": "fpr_at_95_tpr", "auroc_at_0_epochs": "start", "best_epoch_oracle": "oracle", "seconds": "seconds",
}  # fmt: skip
ENDS = {"mean": "value", "low": "low", "high": "high", "reliable": "reliable"}
MEANS = ("data", "method", *ENDS, *SHOWN, "published, %", "source")


def log_table(folder: Path, told: Summary, table: Sequence[dict[str, Any]]) -> None:
    """Log lines, means and page beside the runs that they came from; nothing where wandb is not installed.

    A second call goes on in the same run: its id is that of the folder and the data sets.

    Args:
        folder: Of the table; its ``runs`` hold the offline files.
        told: See summary.summary.
        table: Lines, see formats.lines; at least one.
    """
    own = fingerprint(str(folder.absolute()))
    name = re.sub(r"[^A-Za-z0-9]+", "-", told["title"])
    logger = AutoWandbLogger(
        save_dir=str(folder / "runs"), name="table", id=f"table-{name}-{own}", group=told["title"], job_type="table",
        resume="allow",
    )  # fmt: skip
    if not isinstance(logger, AutoWandbLogger):  # a DummyLogger
        return
    import wandb

    columns = list(table[0])
    shown: dict[str, Any] = {
        "table/runs": wandb.Table([*columns], [[line[column] for column in columns] for line in table]),
        "table/means": wandb.Table(list(MEANS), [list(means) for one in told["sets"] for means in _means(one)]),
        # inject would add a style sheet of W&B's servers
        "table/page": wandb.Html((folder / "table.html").read_text("utf-8"), inject=False),
    }
    for one in told["sets"]:
        values = wandb.Table(
            ["method", "AUROC"], [[m["name"], m["mean"]["value"]] for m in one["methods"] if m["mean"]]
        )
        shown[f"means/{one['data']}"] = wandb.plot.bar(values, "method", "AUROC", f"{one['data']}: mean AUROC")
        if points := list(_curves(one)):
            curves = wandb.Table(["epochs trained", "AUROC", "method"], points)
            title = f"{one['data']}: AUROC over epochs"
            shown[f"curves/{one['data']}"] = wandb.plot.line(curves, "epochs trained", "AUROC", "method", title)
    run = logger.experiment
    run.log(shown)
    for one in told["sets"]:
        place = "mean" if len(told["sets"]) == 1 else f"mean/{one['data']}"
        run.summary.update({f"{place}/{m['name']}": m["mean"]["value"] for m in one["methods"] if m["mean"]})
    run.finish()


def _means(one: Summary) -> Iterator[tuple[Any, ...]]:
    """A line a method of a data set, those that were only published last."""
    for method in [*one["methods"], *one["others"]]:
        mean, known = method.get("mean") or {}, method["published"]
        ends, own = [mean.get(key) for key in ENDS.values()], [method.get(key) for key in SHOWN.values()]
        published = "; ".join(f"{value['value']:g}" for value in known), "; ".join(value["source"] for value in known)
        yield one["data"], method["name"], *ends, *own, *(text or None for text in published)


def _curves(one: Summary) -> Iterator[list[Any]]:
    """Points of the mean over classes; a method without training is a level line, as on the page."""
    means = {name: curves[""] for name, curves in one["curves"].items()}
    last = max((epoch for mean in means.values() for epoch in mean["epochs"]), default=None)
    for method in one["methods"]:
        if mean := means.get(method["name"]):
            pairs = zip(mean["epochs"], mean["mean"], strict=True)
            yield from ([epoch, auroc, method["name"]] for epoch, auroc in pairs)
        elif last is not None and method["mean"]:
            yield from ([epoch, method["mean"]["value"], method["name"]] for epoch in (0.0, last))
