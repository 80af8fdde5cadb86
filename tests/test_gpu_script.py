"""What experiments/gpu.sh starts, up to the command lines."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from panda_lightning.cli import main
from panda_lightning.tools import main as panda
from tests.windows import WINDOWS

pytestmark = pytest.mark.skipif(WINDOWS, reason="a shell script")
HOME = Path(__file__).parents[1]
# Stands for Python on a machine with GPUS GPUs: writes its words down; a search fails.
PYTHON = """#!/bin/sh
case "$*" in
  *device_count*) echo "$GPUS" ;;
  -c*) ;;
  -) echo versions ;;
  *) printf '%s\\037' "$@" >> "$WORDS"; echo >> "$WORDS"; echo '| a table |'; echo done ;;
esac
case "$*" in *search.py*) exit 3 ;; esac
"""


@pytest.fixture
def start(tmp_path):
    def call(*names, gpus=1, **environment):
        python, words = tmp_path / "python", tmp_path / "words"
        python.write_text(PYTHON)
        python.chmod(0o755)
        words.write_text("")
        environment = {**os.environ, "PYTHON": str(python), "WORDS": str(words), "GPUS": str(gpus), **environment}
        command = ["sh", HOME / "experiments/gpu.sh", tmp_path / "data", tmp_path / "out", *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        report = (tmp_path / "out/report.md").read_text()
        return done, report, [line.split("\037")[:-1] for line in words.read_text().splitlines()]

    return call


SHORT = ["tests", "layers", "search", "segmentation", "bench", "scaling", "run"]
LONG = ["together", "layers152", "bench152", "published", "tables", "mvtec"]


def test_a_step_that_fails_does_not_stop_the_next_and_the_report_tells_all(start):
    done, report, words = start()
    assert done.returncode == 1
    rows = re.findall(r"^\| (\S+) \| (\d+) \| \d+ \| (\d+) \|$", report, re.M)
    assert [(name, int(code)) for name, code, _ in rows] == [(name, 3 * (name == "search")) for name in SHORT]
    assert sum(int(limit) for *_, limit in rows) <= 9 * 60
    assert report.count("| a table |") == len(words) == len(SHORT)
    assert "cifar-10-batches-py: the run is on scikit-learn's digits" in report
    assert re.search(r"^commit \w+, ", report, re.M)


def test_without_a_gpu_all_is_tiny_and_the_report_says_so(start):
    _, report, words = start(gpus=0)
    assert "tiny" in report
    assert len(words) == len(SHORT)
    assert [word for word in words[0] if word.startswith("tests/")] == ["tests/test_gpu.py"]
    assert start("nothing")[0].returncode == 1


def test_a_step_ends_at_its_limit(start, tmp_path):
    text = (HOME / "experiments/gpu.sh").read_text().replace("step search 40", "step search 1")
    (tmp_path / "experiments").mkdir()
    script = tmp_path / "experiments/gpu.sh"
    script.write_text(text)
    python = tmp_path / "sleeper"
    python.write_text('#!/bin/sh\ncase "$*" in *device_count*) echo 1 ;; -*) ;; *) exec sleep 20 ;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    subprocess.run(["sh", script, tmp_path, tmp_path / "out", "search"], env=environment, check=False)
    assert "| search | 124 | " in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize("small", [False, True])
def test_every_script_and_option_is_there(start, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HOME)
    names = SHORT if small else [*SHORT, *LONG]
    (tmp_path / "data/cifar-10-batches-py").mkdir(parents=True)
    _, _, found = start(*names, gpus=2, **({"SMALL": "1"} if small else {}))
    assert len(found) >= len(names)
    for words in found:
        if words[:2] == ["-m", "pytest"]:
            assert all((HOME / word).exists() for word in words if word.startswith("tests/"))
        elif words[:2] == ["-m", "panda_lightning"]:
            with pytest.raises(SystemExit) as end:
                main([*words[2:], "--print_config"])
            assert not end.value.code
        elif words[:2] == ["-m", "panda_lightning.tools"]:
            assert panda([*words[2:], "--run=false"]) in (None, 0)
        else:
            path = HOME / words[0]
            text = (path / "__main__.py" if path.is_dir() else path).read_text()
            for word in (word for word in words if word.startswith("--") and "." not in word):
                assert re.search(rf'"(--)?{word[2:]}"', text), (words, word)
