"""Two and three CPU processes (gloo) against one: every detector in tests/ranks.py; PANDA as a user launches it."""

import csv
import os
import socket
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from panda_lightning.cli import main
from tests import copies, ranks
from tests.conftest import fast, make_folder
from tests.windows import WINDOWS

pytestmark = pytest.mark.skipif(WINDOWS, reason="several processes were never tried there")
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


IN_TWO = ("PANDA, SES", "PANDA, ViT", "PANDA-OE", "DN2", "DN2, sharded", "equal features", "equal features, sharded",
          "PANDA, SES, sharded", "RotNet", "PatchCore")  # fmt: skip
# three are more than there are images in the last step, or batches to score
PAIRS = [(2, case) for case in IN_TWO] + [(3, case) for case in ranks.CASES]


def start(root: Path, out: Path, world: int, cases: list[str], **where: str) -> None:
    """Run cases in processes as torchrun would start them; ``where`` says on what, see tests/ranks.py."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    base = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    base |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"} | where
    processes = [
        copies.started(ranks.run_all, root, out, cases, RANK=str(rank), LOCAL_RANK=str(rank), **base)
        for rank in range(world)
    ]
    copies.ended(*processes)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By number of processes, a folder with what came out of every case."""
    root = ranks.images(tmp_path_factory.mktemp("ranks"))
    folders = {world: root / f"on{world}" for world in (1, 2, 3)}
    for world in (2, 3):
        start(root, folders[world], world, [case for n, case in PAIRS if n == world])
    folders[1].mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for case in ranks.CASES:
        ranks.run(root, 1, case, folders[1])
    torch.set_num_threads(threads)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), PAIRS)
def test_any_number_of_processes_is_one(outcomes, world, case):
    one, many = (torch.load(outcomes[n] / f"{case}.pt", weights_only=True) for n in (1, world))
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if case in ranks.FROM_SCRATCH else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in zip(one["rows"], many["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance["rtol"], abs=1e-9)
    for name, value in one["state"].items():
        torch.testing.assert_close(many["state"][name], value, **tolerance)
    for key in ("score", "ses", "bank", "centre", "radius"):
        if one[key] is not None:
            scale = float(one[key].abs().max())
            torch.testing.assert_close(many[key], one[key], rtol=tolerance["rtol"], atol=tolerance["rtol"] * scale)
    assert one["steps_trained"] == many["steps_trained"]


@pytest.mark.slow
def test_nccl_is_given_tensors_of_gpus_alone(outcomes, tmp_path):
    """Of methods without gradients that tests/played.py does not see; the others' tensors take the same ways."""
    cases = [
        "DN2, sharded",
        "PatchCore",
        "PatchCore, several sizes",
        "SPADE",
        "OC-SVM",
        "PANDA-OE",
        "PANDA, several sizes",
    ]
    start(outcomes[1].parent, tmp_path / "nccl", 2, cases, PLAY_NCCL="1")
    for case in cases:
        one, many = (
            torch.load(folder / f"{case}.pt", weights_only=True) for folder in (outcomes[1], tmp_path / "nccl")
        )
        torch.testing.assert_close(many["score"], one["score"], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(one["rows"], many["rows"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_equal_features_give_equal_scores(outcomes, world):
    one, many = (torch.load(outcomes[n] / "equal features.pt", weights_only=True) for n in (1, world))
    assert torch.equal(one["bank"], many["bank"])
    assert one["rows"][-1]["test/auroc"] == pytest.approx(many["rows"][-1]["test/auroc"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_bank_in_parts_gives_the_same_scores(outcomes, world):
    for case in ("DN2", "equal features", "PANDA, SES"):  # the second with more neighbours than a part has images
        whole, parts = (torch.load(outcomes[world] / f"{name}.pt") for name in (case, f"{case}, sharded"))
        assert (whole["part"], parts["part"]) == (13, -(-13 // world))
        if case != "PANDA, SES":  # its centre is added up in another order
            assert torch.equal(whole["bank"], parts["bank"])
            assert torch.equal(whole["score"], parts["score"])
        common = {key: value for key, value in whole["rows"][-1].items() if not key.startswith("features/")}
        assert common == pytest.approx(parts["rows"][-1], rel=1e-5)  # of a bank in parts nothing is told of features


@pytest.mark.slow
def test_a_process_may_be_without_normal_images(tmp_path):
    make_folder(tmp_path / "images", train=2)
    start(tmp_path, tmp_path / "on3", 3, ["DN2, sharded"])
    (tmp_path / "on1").mkdir()
    ranks.run(tmp_path, 1, "DN2", tmp_path / "on1")
    parts, one = (torch.load(tmp_path / path) for path in ("on3/DN2, sharded.pt", "on1/DN2.pt"))
    assert (parts["part"], len(parts["bank"])) == (1, 2)
    for key in ("bank", "score"):
        torch.testing.assert_close(parts[key], one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_that_end_with_fit_leave_the_trained_detector(tmp_path):
    """As of the strategies ddp_spawn and ddp_fork, of which notebooks take one by default."""
    root = ranks.images(tmp_path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    one = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "enable_model_summary": False} | quiet
    found = []
    for several in ({"devices": 1}, {"devices": 2, "strategy": DDPStrategy(start_method=copies.METHOD)}):
        pl.seed_everything(0, verbose=False)
        detector = ranks.CASES["PANDA, SES"][1](None)
        pl.Trainer(**one | several).fit(detector, ranks.data(root))
        fitted = detector.scores.score
        pl.Trainer(**one).test(detector, ranks.data(root), verbose=False)  # by the object in hand, in this process
        found.append({"fit": fitted, "test": detector.scores.score, "centre": detector.centre})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1]["test"], found[1]["fit"], rtol=1e-4, atol=1e-5)


# ---- as a user launches it -----------------------------------------------------------------------------------------


def launch(workdir: Path, name: str, words: list[str], devices: int) -> Path:
    words = [*words, f"--trainer.devices={devices}", f"--trainer.logger.name={name}"]
    if devices == 1:
        with chdir(workdir):
            copies.ended(copies.started(main, words))
    else:
        command = [sys.executable, "-m", "panda_lightning", *words, "--trainer.strategy=ddp"]
        done = subprocess.run(command, cwd=workdir, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    return workdir / "runs" / name / "version_0"


def logged(folder: Path, key: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    folder = make_folder(tmp_path / "images", train=13)  # the last global batch of four holds one image
    words = ["fit", *fast(folder, epochs=2), "--model.grad_clip=10", "--model.ewc_weight=100"]
    caches = ([], ["--model.prefix_cache_dir=cache"])  # in memory; in files that two processes share
    one, two = (launch(tmp_path, f"on{n}", words + caches[n - 1], n) for n in (1, 2))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert logged(one, "bank/size") == logged(two, "bank/size") == [13] * 3
    for key in ("val/auroc", "train/compactness", "train/ewc", "train/loss", "train/grad_norm"):
        assert logged(one, key) == pytest.approx(logged(two, key), rel=1e-4), key
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (one, two))
    a, b = (kept["state_dict"]["_extra_state"]["derived"] for kept in (a, b))
    for key in ("bank", "centre"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4 * float(a[key].abs().max()))
    for name, value in a["fisher"].items():
        torch.testing.assert_close(b["fisher"][name], value, rtol=1e-3, atol=1e-5 * float(value.max()))
    steps = ("steps_trained", "_steps_per_epoch", "_steps_scored")
    assert [a[name] for name in steps] == [b[name] for name in steps]
    assert a["origin"] == b["origin"]
