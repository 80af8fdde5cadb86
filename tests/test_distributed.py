"""Two CPU processes (gloo) against one, each launched as a user launches it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import fast, make_folder


def launch(workdir: Path, name: str, words: list[str], devices: int) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    parallel = ["--trainer.strategy=ddp"] if devices > 1 else []
    command = [sys.executable, "-m", "panda_lightning", *words, f"--trainer.devices={devices}", *parallel]
    command += [f"--trainer.logger.name={name}"]
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return workdir / "runs" / name / "version_0"


def logged(folder: Path, key: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


@pytest.mark.slow
@pytest.mark.parametrize("train", [11, 13])  # 13: the last global batch of four holds one image
def test_two_processes_are_one(tmp_path, train):
    folder = make_folder(tmp_path / "images", train=train)
    words = ["fit", *fast(folder, epochs=2), "--model.grad_clip=10", "--model.ewc_weight=100"]
    caches = ([], ["--model.prefix_cache_dir=cache"])  # in memory; in files that two processes share
    one, two = (launch(tmp_path, f"on{n}", words + caches[n - 1], n) for n in (1, 2))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert logged(one, "bank/size") == logged(two, "bank/size") == [train] * 3
    for key in ("val/auroc", "train/compactness", "train/ewc", "train/loss", "train/grad_norm"):
        assert logged(one, key) == pytest.approx(logged(two, key), rel=1e-4), key
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (one, two))
    for key in ("bank", "centre"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4 * float(a[key].abs().max()))
    for name, value in a["fisher"].items():
        torch.testing.assert_close(b["fisher"][name], value, rtol=1e-3, atol=1e-5 * float(value.max()))
    assert (a["bank_step"], a["steps"]) == (b["bank_step"], b["steps"])


@pytest.mark.slow
def test_two_processes_test_as_one(tmp_path):
    folder = make_folder(tmp_path / "images", train=5, normal=4, anomalous=3)
    words = ["test", *fast(folder, model="DN2")]
    one, two = (launch(tmp_path, f"on{n}", words, n) for n in (1, 2))
    assert logged(one, "test/auroc") == logged(two, "test/auroc")
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["bank"] for f in (one, two))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "words"), [("MSC", ["--model.lr=0.01"]), ("PANDAOE", ["--data.outliers=others"])])
def test_two_processes_train_the_other_methods_as_one(tmp_path, model, words):
    folder = make_folder(tmp_path / "images")
    make_folder(tmp_path / "others", train=0, normal=0, anomalous=9)
    words = ["fit", *fast(folder, model=model, epochs=2), *words]
    one, two = (launch(tmp_path, f"on{n}", words, n) for n in (1, 2))
    for key in ("val/auroc", "train/loss", "train/grad_norm"):
        assert logged(one, key) == pytest.approx(logged(two, key), rel=1e-3), key
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (one, two))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-5)
