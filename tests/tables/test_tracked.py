"""What a table logs beside CSV, read back with the loggers' own readers."""

import csv
import json
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from panda_lightning.detectors import PANDA
from panda_lightning.runtime import loggers
from panda_lightning.tables.plan import planned
from panda_lightning.tables.rows import Rows
from panda_lightning.tables.tracked import log_table
from panda_lightning.tools import main
from tests.callbacks.test_media import inspect

HOME = Path(__file__).parents[2]
SMALL = ["--trainer.max_epochs=2", "--data.image_size=32", "--data.train_limit=40", "--data.test_limit=120",
         "--model.grad_clip=1"]  # fmt: skip
WORDS = ["table", "--config=digits.yaml", f"--words={' '.join(SMALL[:4])}", "--folder=table"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A table that was written twice; a row that fails comes before others."""
    place = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        linked(place)
        (place / "wrong.yaml").write_text("model: {class_path: DN2, init_args: {k: 4000}}\n")
        words = [*WORDS, "--methods=wrong.yaml,dn2,early --model.grad_clip=1", "--classes=8,9"]
        assert main([*words, "--loggers=AutoWandbLogger"]) == 1
        assert main([*words, "--loggers=AutoWandbLogger", "--run=false"]) == 1
    return place


@cache  # takes half a second each, and the files are whole
def records(path: Path, *options: str) -> Any:
    return inspect(path, *options)


def linked(place: Path) -> None:
    for name in ("digits.yaml", "variants"):
        (place / name).symlink_to(HOME / "conf" / name)


def pieces(folder: Path) -> dict[str, list[Path]]:
    """W&B's offline files by the names of their runs, in the order in which they were made."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((folder / "runs/wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        found[start(path)["display_name"]].append(path)
    return found


def start(path: Path) -> dict[str, Any]:
    """What a run says of itself when it starts."""
    return next(record["run"] for record in records(path) if record["type"] == "run")


def history(path: Path) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records(path) if record["type"] == "history"]


def curve(path: Path, key: str = "val/auroc") -> list[tuple[float, float]]:
    return [(line["epochs_trained"], line[key]) for line in history(path) if key in line]


def media_table(path: Path, line: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The lines of a wandb.Table."""
    known = json.loads((path.parent / "files" / line[f"{key}.path"]).read_text())
    return [dict(zip(known["columns"], values, strict=True)) for values in known["data"]]


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


def test_each_row_is_a_run_of_its_own(place):
    found = pieces(place / "table")
    rows = [one for one in Rows(place / "table").read() if one.error is None]
    assert len(rows) == 4
    ids = set()
    for one in rows:
        (path,) = found[one.row.name]
        run, end = start(path), records(path, "--summary")
        ids.add(run["run_id"])
        assert (run["run_group"], run["job_type"], run["project"]) == ("Digits", one.row.column, "panda-lightning")
        assert sorted(run["tags"]) == [one.row.normal, "seed 0"]
        assert (end["state"], end["exit_code"]) == ("finished", 0)
        for name, value in {"normal_class": one.row.normal, "seed": 0, "image_size": 32, "test_limit": 120}.items():
            assert end["config"][name] == value, name
        key = "test/auroc" if one.row.method == "dn2" else "val/auroc"
        assert curve(path, key) == one.curve
        assert end["summary"][key] == one.auroc
        assert end["summary"]["images/most_anomalous"]["count"] == 8
        assert "scores/normal" in end["summary"]
    assert len(ids) == 4
    failed = [one.row for one in Rows(place / "table").read() if one.error]
    assert len(failed) == 2
    for row in failed:
        (path,) = found[row.name]  # it had begun
        assert (records(path, "--summary")["exit_code"], curve(path, "test/auroc")) == (1, [])


def test_the_last_epoch_counts_and_not_the_best(place):
    (row,) = (
        one.row for one in Rows(place / "table").read() if one.row.method.startswith("early") and one.row.normal == "8"
    )
    (path,) = pieces(place / "table")[row.name]
    aurocs = [value for _, value in curve(path)]
    assert max(aurocs) > aurocs[-1]  # else the next line says nothing
    assert records(path, "--summary")["summary"]["val/auroc"] == aurocs[-1]


def test_metrics_are_drawn_over_epochs(place):
    for name, (path, *_) in pieces(place / "table").items():
        if "early" in name:
            metrics = [r["metric"] for r in records(path) if r["type"] == "metric"]
            over = {m["glob_name"] for m in metrics if m.get("step_metric") == "epochs_trained"}
            prefixes = {key.split("/")[0] for line in history(path) for key in line if "/" in key}
            assert {f"{prefix}/*" for prefix in prefixes} - over <= {"trainer/*", "images/*"}


def test_the_table_is_one_run_with_lines_means_page_and_plots(place):
    first, second = pieces(place / "table")["table"]
    assert start(first)["run_id"] == start(second)["run_id"]
    run = start(second)
    assert (run["run_group"], run["job_type"], run["resume"]) == ("Digits", "table", True)
    (line,) = history(second)

    lines = media_table(second, line, "table/runs")
    with (place / "table/table.csv").open() as file:
        for ours, theirs in zip(lines, csv.DictReader(file), strict=True):
            assert {k: "" if v is None else str(v) for k, v in ours.items()} == theirs
    assert [one["auroc"] is None for one in lines] == [bool(one["error"]) for one in lines]

    means = {one["method"]: one for one in media_table(second, line, "table/means")}
    scored = [one for one in lines if one["method"] == "dn2"]
    assert means["dn2"]["mean"] == pytest.approx(sum(one["auroc"] for one in scored) / 2)
    assert means["dn2"]["low"] < means["dn2"]["mean"] < means["dn2"]["high"]
    assert (means["wrong"]["mean"], means["wrong"]["runs"]) == (None, 0)

    page = second.parent / "files" / line["table/page.path"]
    assert page.read_bytes() == (place / "table/table.html").read_bytes()

    summary = records(second, "--summary")["summary"]
    early = "early --model.grad_clip=1"
    assert {key: summary[f"mean/{key}"] for key in ("dn2", early)} == {
        key: means[key]["mean"] for key in ("dn2", early)
    }
    assert "mean/wrong" not in summary
    bars = media_table(second, line, "means/Digits_table")
    assert [(bar["method"], bar["AUROC"]) for bar in bars] == [(key, means[key]["mean"]) for key in ("dn2", early)]
    points = media_table(second, line, "curves/Digits_table")
    assert [point["epochs trained"] for point in points if point["method"] == early] == [0, 1, 2]
    assert [point["epochs trained"] for point in points if point["method"] == "dn2"] == [0, 2]  # a level line
    assert {point["AUROC"] for point in points if point["method"] == "dn2"} == {means["dn2"]["mean"]}


def test_plots_are_charts_of_their_tables(place):
    _, path = pieces(place / "table")["table"]
    updates = [record["config"]["update"] for record in records(path) if record["type"] == "config"]
    charts = {
        key.removeprefix("_wandb.visualize."): chart["panel_config"]
        for update in updates
        for key, chart in update.items()
        if key.startswith("_wandb.visualize.")
    }
    assert set(charts) == {"means/Digits", "curves/Digits"}
    (line,) = history(path)
    for name, chart in charts.items():
        assert set(chart["fieldSettings"].values()) <= set(media_table(path, line, f"{name}_table")[0])
    assert charts["curves/Digits"]["fieldSettings"]["stroke"] == "method"  # a line each


def test_published_figures_stand_in_the_means_and_none_where_there_are_none(workdir):
    ends = {"value": 0.9, "low": 0.8, "high": 0.95, "reliable": True}
    known = [{"value": 92.5, "source": "A"}, {"value": 92, "source": "B"}]
    method = {"name": "dn2", "mean": ends, "published": known, "seconds": 1.5}
    one = {"data": "D", "methods": [method], "others": [{"name": "o", "published": known[:1]}], "curves": {}}
    (workdir / "table.html").write_text("<p>")
    told = {"title": "D, E", "sets": [one, {**one, "data": "E", "others": []}]}
    log_table(workdir, told, [{"a": None}, {"a": 1}])
    (path,) = pieces(workdir)["table"]
    (line,) = history(path)
    means = media_table(path, line, "table/means")
    assert [(m["data"], m["method"], m["published, %"], m["source"]) for m in means] == [
        ("D", "dn2", "92.5; 92", "A; B"), ("D", "o", "92.5", "A"), ("E", "dn2", "92.5; 92", "A; B"),
    ]  # fmt: skip
    assert media_table(path, line, "table/runs") == [{"a": None}, {"a": 1}]
    summary = records(path, "--summary")["summary"]
    assert (summary["mean/D/dn2"], summary["mean/E/dn2"]) == (0.9, 0.9)  # of each data set
    assert start(path)["run_group"] == "D, E"


def test_another_folder_is_another_run(workdir):
    told = {"title": "D", "sets": []}
    for name in ("a", "b"):
        (workdir / name).mkdir()
        (workdir / name / "table.html").write_text("<p>")
        log_table(workdir / name, told, [{"a": 1}])
    one, other = (start(pieces(workdir / name)["table"][0])["run_id"] for name in ("a", "b"))
    assert one != other


def test_without_wandb_nothing_is_logged(workdir, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    log_table(workdir, {"title": "D", "sets": []}, [{"a": 1}])
    assert not list(workdir.iterdir())


def test_a_run_that_was_killed_goes_on_under_its_id(workdir, monkeypatch):
    import wandb

    linked(workdir)
    plan = planned(["digits.yaml"], {"early": "early"}, ["8", "9"], [0], SMALL)
    list(Rows(workdir / "whole").make(plan))

    def killed(detector):
        if detector.trainer.current_epoch and detector.trainer.datamodule.normal_class == "9":
            raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(PANDA, "on_train_epoch_start", killed)
        with pytest.raises(SystemExit):
            list(Rows(workdir / "table", ["AutoWandbLogger"]).make(plan))
    wandb.finish()  # as the end of its process does
    rows = Rows(workdir / "table", ["AutoWandbLogger"])
    assert [found is None for _, found in rows.make(plan)] == [True, False]
    assert [one.curve for one in rows.read()] == [one.curve for one in Rows(workdir / "whole").read()]
    log = (workdir / "table/runs" / plan[1].name / "log.txt").read_text()
    assert log.count("Restored all states from the checkpoint") == 1
    first, second = pieces(workdir / "table")[plan[1].name]
    assert start(first)["run_id"] == start(second)["run_id"]
    assert start(second)["resume"]
    assert [epoch for epoch, _ in curve(first)] == [0, 1]

    assert curve(second)[-1] == tuple(rows.read()[1].curve[-1])


def test_the_workspace_names_what_is_logged(place):
    pytest.importorskip("wandb_workspaces")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = [*WORDS, "--methods=ses,ewc", "--classes=9", "--folder=others", "--loggers=AutoWandbLogger"]
        assert main(words) == 0
    script = [sys.executable, HOME / "examples/wandb_workspace.py", "me", "p", "--dry-run"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    section = json.loads(done.stdout)["section"]
    sections = section["panelBankConfig"]["sections"]
    assert [one["name"] for one in sections] == ["AUROC", "training", "features", "scores", "images", "table"]

    named = {"epochs_trained"}
    for panel in (panel for one in sections for panel in one["panels"]):
        config = panel["config"]
        asked = config.get("metrics") or config.get("mediaKeys")
        named |= set(asked or [config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]])
        assert config.get("xAxis", "epochs_trained") == "epochs_trained"
    paths = [path for folder in ("table", "others") for own in pieces(place / folder).values() for path in own]
    logged = {key for path in paths for key in records(path, "--summary")["summary"]}
    assert named <= logged
    assert len(named) > 20

    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["group", "jobType", "normal_class.value"]
    configs = {key for path in paths for key in records(path, "--summary")["config"]}
    shown = {name.split(":")[1] for name in runs["runFeed"]["columnOrder"]}
    assert shown - {"displayName"} <= logged | configs
    assert "normal_class" in configs


# ---- TensorBoard and MLflow ------------------------------------------------------------------------------------------


@pytest.fixture
def one_row(workdir):
    """Make a row with a logger; its log, from CSV: values by key and step."""

    def make(logger: str) -> dict[str, dict[int, float]]:
        linked(workdir)
        ((_, found),) = Rows(workdir / "table", [logger]).make(
            planned(["digits.yaml"], {"early": "early"}, ["9"], [0], SMALL)
        )
        assert found.error is None
        (log,) = (workdir / "table/runs").rglob("metrics.csv")
        values: dict[str, dict[int, float]] = defaultdict(dict)
        with log.open() as file:
            for line in csv.DictReader(file):
                for key in ("val/auroc", "epochs_trained", "train/compactness", "features/effective_rank"):
                    if line[key]:
                        values[key][int(line["step"])] = float(line[key])
        assert [len(own) for own in values.values()] == [3, 3, 3, 2]
        return values

    return make


def test_tensorboard_has_the_numbers_of_csv(one_row, workdir):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = one_row("TensorBoardLogger")
    (events,) = (workdir / "table").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    for key, expected in values.items():
        found = {event.step: event.value for event in log.Scalars(key)}
        assert found == pytest.approx(expected, rel=1e-6), key  # TensorBoard holds float32


def test_mlflow_has_the_numbers_of_csv(one_row, workdir):
    mlflow = pytest.importorskip("mlflow")
    values = one_row("MLFlowLogger")
    client = mlflow.MlflowClient(f"file:{workdir}/table/runs/mlruns")
    (experiment,) = (one for one in client.search_experiments() if one.name == "Digits")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name.startswith("Digits-9-early-0-")
    assert (run.info.status, run.data.params["normal_class"]) == ("FINISHED", "9")
    for key, expected in values.items():
        found = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, key)}
        assert found == expected, key
    log = next((workdir / "table/runs").glob("*/log.txt")).read_text()
    assert "Malformed experiment" not in log
