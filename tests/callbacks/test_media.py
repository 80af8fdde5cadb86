"""An offline run, read back with W&B's own reader."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from tests.conftest import fast, make_folder


def inspect(path: Path, *options: str) -> Any:
    wandb_command = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [wandb_command, "leet", "inspect", "--json", *options, str(path)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout) if options else [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def offline_run(run, workdir):
    folder = make_folder(workdir / "images")
    words = [w for w in fast(folder) if "trainer.logger" not in w]
    logger = "--trainer.logger=[{class_path: CSVLogger, init_args: {save_dir: runs, name: t}}, AutoWandbLogger]"
    run("fit", *words, logger, "--model.ewc_weight=0", "--model.grad_clip=10")
    wandb.finish()
    (path,) = (workdir / "runs/wandb").glob("offline-run-*/*.wandb")
    return path


def test_an_offline_run_holds_what_runs_are_compared_by(offline_run):
    records = inspect(offline_run)
    start = next(r["run"] for r in records if r["type"] == "run")
    assert (start["project"], start["run_group"], start["job_type"]) == (
        "panda-lightning",
        "ImageFolder",
        "PANDA-Early",
    )

    end = inspect(offline_run, "--summary")
    for name, value in {"lr": 1e-2, "k": 2, "image_size": 32, "normal_class": "spot", "max_epochs": 2}.items():
        assert end["config"][name] == value, name

    metrics = [r["metric"] for r in records if r["type"] == "metric"]
    steps = {m.get("glob_name", m.get("name")): m.get("step_metric") for m in metrics}
    assert steps["val/*"] == steps["train/*"] == "epochs_trained"
    assert len(metrics) == len(steps)  # each is defined once

    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    aurocs = [(row["epochs_trained"], row["val/auroc"]) for row in history if "val/auroc" in row]
    assert [x for x, _ in aurocs] == [0.0, 1.0, 2.0]
    assert end["summary"]["val/auroc"] == aurocs[-1][1]  # the last epoch's, not the best
    logged = {name for row in history for name in row}
    assert {"train/compactness", "train/grad_norm", "train/distance_from_start", "bank/size", "bank/seconds"} <= logged
    assert sum("scores/normal.bins" in row and "scores/anomalous.bins" in row for row in history) == 3
    (pictures,) = (row for row in history if "images/most_anomalous.count" in row)
    assert pictures["images/most_anomalous.count"] == pictures["images/least_anomalous.count"] == 8
    assert pictures["images/most_anomalous.captions"][0].startswith("anomalous, score")
    assert "roc_table.path" in pictures
    assert len(list((offline_run.parent / "files/media").rglob("*.png"))) == 16
    captions = pictures["images/most_anomalous.captions"]
    assert len(captions) == 8
    for caption in captions:
        assert re.fullmatch(r"(anomalous|normal), score [\d.e+]+; nearest: (\d{3}\.png \([\d.e+]+\)(, )?){3}", caption)


def test_a_folder_without_test_images_has_no_pictures(run, workdir):
    folder = make_folder(workdir / "images")
    shutil.rmtree(folder / "test")
    words = [w for w in fast(folder, model="DN2") if "trainer.logger" not in w]
    run("test", *words, "--trainer.logger=AutoWandbLogger")
    assert list(workdir.glob("**/last.ckpt"))
