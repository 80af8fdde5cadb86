"""Lay W&B's panels out for runs of this project: ``python examples/wandb_workspace.py ENTITY PROJECT``.

It saves a view "panda-lightning" with W&B's own package (``pip install wandb-workspaces``), which needs an account.
"""

import argparse
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

METHOD = wr.Metric("JobType")  # a line a method: the mean over its classes and seeds, in their range


def lines(title: str, *metrics: str) -> wr.LinePlot:
    """Metrics over epochs, a line a method."""
    return wr.LinePlot(
        title=title, x="epochs_trained", y=list(metrics), title_x="epochs trained", groupby=METHOD,
        groupby_aggfunc="mean", groupby_rangefunc="minmax",
    )  # fmt: skip


SECTIONS: dict[str, list[Any]] = {
    "AUROC": [
        lines("AUROC", "val/auroc"),
        lines("AUROC, sample-wise early stopping", "val/auroc_ses"),
        wr.BarPlot(title="AUROC after the last epoch", metrics=["val/auroc"], groupby=METHOD, groupby_aggfunc="mean"),
        wr.BarPlot(title="AUROC without training", metrics=["test/auroc"], groupby=METHOD, groupby_aggfunc="mean"),
    ],
    "training": [
        lines("compactness", "train/compactness"),
        lines("EWC", "train/ewc"),
        lines("gradient norm before clipping", "train/grad_norm"),
        lines("distance from the start", "train/distance_from_start"),
    ],
    "features": [
        lines(name.replace("_", " "), f"features/{name}")
        for name in ("effective_rank", "variance", "nearest", "nearest_spread", "neighbours_kept", "ewc_share")
    ],
    # the last histogram of each run; over epochs W&B draws them in the page of a run alone
    "scores": [wr.WeavePanelSummaryTable(table_name=f"scores/{name}") for name in ("normal", "anomalous")],
    "images": [wr.MediaBrowser(title="images", media_keys=["images/most_anomalous", "images/least_anomalous"])],
    "table": [
        wr.WeavePanelSummaryTable(table_name="table/means"),
        wr.WeavePanelSummaryTable(table_name="table/runs"),
        wr.MediaBrowser(title="page", media_keys=["table/page"]),
    ],
}


def workspace(entity: str, project: str) -> ws.Workspace:
    """The view, not yet saved."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name="panda-lightning",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in SECTIONS.items()],
        auto_generate_panels=True,  # W&B's own follow for the rest: ROC curves, the plots of `panda table`
        settings=ws.WorkspaceSettings(x_axis="epochs_trained", group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group"), ws.Metric("JobType"), ws.Config("normal_class")],
            pinned_columns=["summary:val/auroc", "summary:test/auroc", "config:normal_class", "config:seed"],
        ),
    )


def main() -> None:
    """Save the view, or print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entity")
    parser.add_argument("project")
    parser.add_argument("--dry-run", action="store_true", help="print the view as JSON, without a network")
    given = parser.parse_args()
    view = workspace(given.entity, given.project)
    sent = view._model.spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)  # as save() sends it
    print(sent if given.dry_run else view.save().url)


if __name__ == "__main__":
    main()
