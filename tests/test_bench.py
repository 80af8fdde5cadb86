"""The scripts of experiments/bench that compare, in a small form."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests.conftest import script

HOME = Path(__file__).parents[1]
BENCH = HOME / "experiments/bench"

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the scripts read Linux's /proc")
peer = script("experiments/bench/peer.py")


def said(name: str, *words: str) -> str:
    """What a script prints."""
    environment = {**os.environ, "PYTHONPATH": str(HOME / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(BENCH / name), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def cells(text: str) -> list[list[str]]:
    """The rows of the one table in a text, without its head."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


def test_search_has_a_row_for_each_bank_and_every_method_is_exact():
    text = said("search.py", "--here", "--repeats=1", "--queries=60", "--dims", "4", "160", "--banks", "300", "600")
    rows = [row for row in cells(text) if "growth" not in row]
    assert [row[:3] for row in rows] == [[d, n, "60"] for d in ("4", "160") for n in ("300", "600")]
    assert [row[-1] for row in rows] == ["none"] * 4
    assert text.count("growth |") == 2


def test_neighbours_in_float64_are_the_nearest(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(BENCH))
    bank = torch.zeros(20_000, 1)  # more than are looked at together
    bank[[3, 9000, 19_999]] = torch.tensor([[5.0], [5.5], [4.0]])
    found = script("experiments/bench/search.py").nearest(torch.full((2, 1), 5.1), bank, 3)
    assert found.tolist() == [[3, 9000, 19_999]] * 2


@pytest.mark.slow
def test_collectives_and_bytes_of_several_processes_are_the_models():
    text = said("ddp.py", "--repeats=1", "--rows=601", "--dims=64", "--queries=300", "--worlds", "1", "2")
    counted = re.findall(r"\| (\d+) \((\d+)\) \|", text)
    assert len(counted) == 4
    assert all(one == other for one, other in counted)
    assert float(re.search(r"bytes within ([\d.]+)%", text)[1]) <= 1
    assert {row[2] for row in cells(text)} == {"1", "2", "8", "64"}


def run(whole: float, peak: float) -> dict:
    """What a run of peer.py measures."""
    times = {"whole": whole, "fit": whole / 2, "test": whole / 4}
    return {**times, "peak": peak, "imports": 1.0, "auroc": 0.98, "pixel_auroc": None, "entries": 7}


def test_peers_are_compared_run_by_run():
    found = {"anomalib": [run(40, 2.0), run(90, 3.0), run(50, 2.0)], "ours": [run(10, 1.5), run(10, 1.5), run(10, 1.5)]}
    lines = [line.strip("| ").split(" | ") for line in peer.rows(0.01, found)]
    assert lines[0][:3] == ["0.01", "anomalib", "50.0 (40.0 to 90.0)"]
    assert lines[1][1:] == ["ours", "10.0 (10.0 to 10.0)", "5.0", "2.5", "1.50", "1.00", "0.50", "0.9800", "-", "7"]
    assert lines[2][1:7] == ["anomalib / ours", "5.0", "5.0", "5.0", "1.33", ""]  # of the runs side by side
    assert lines[2][7].strip(" |") == "2.00"


def test_a_peer_that_fails_says_why(tmp_path):
    options = Namespace(root=tmp_path, category="x", network=tmp_path, size=64, workers=0, threads=1)
    with pytest.raises(SystemExit, match=r"(?s)anomalib: .*No module named 'anomalib'") as failed:
        peer.timed(sys.executable, "anomalib", options, 0.1, 0, tmp_path)
    assert "Traceback" in str(failed.value)


@pytest.mark.slow
def test_our_side_is_a_whole_run(shared, tmp_path):
    subprocess.run(["bash", shared / "data/unpack", tmp_path, "mvtec"], check=True)
    network = shared / "weights/mobilenetv2_100.in1k"
    options = Namespace(root=tmp_path / "mvtec", category="leather", network=network, size=128, workers=0, threads=1)
    found = peer.timed(sys.executable, "ours", options, 0.1, 0, tmp_path)
    assert found["images"] == [4, 15]
    assert found["entries"] == round(0.1 * 4 * 16 * 16)
    assert found["whole"] > found["fit"] + found["test"] > 0
    assert found["peak"] > found["imports"] > 0.1
    assert found["auroc"] > 0.9
    assert (tmp_path / "ours.patches").stat().st_size == 4 * 128 * 8 * 8
