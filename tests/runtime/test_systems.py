"""What systems differ in; tests/test_apple.py runs every method on a device without float64."""

import ast
import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import panda_lightning
from panda_lightning.runtime import systems
from tests.conftest import fast, make_folder
from tests.windows import LACKING, MODULES, WINDOWS, lock_as_there

ROOT = Path(panda_lightning.__file__).parent


@pytest.fixture(params=["here", "as on Windows"])
def _both(request, monkeypatch):
    if request.param != "here":
        lock_as_there(monkeypatch)


def opened(path):
    return os.open(path, os.O_CREAT | os.O_RDWR)


@pytest.mark.usefixtures("_both")
def test_a_lock_is_one_handles_until_it_is_closed(tmp_path):
    first, second = opened(tmp_path / "file"), opened(tmp_path / "file")
    os.write(first, b"some")
    assert systems.lock(first)
    assert os.lseek(first, 0, os.SEEK_CUR) == 4  # where it was
    assert not systems.lock(second)
    assert (tmp_path / "file").read_bytes() == b"some"  # others may read
    os.close(first)
    assert systems.lock(second, wait=True)
    os.close(second)


@pytest.mark.skipif(WINDOWS, reason="a child there does not hold its parent's locks")
def test_a_child_that_inherits_the_handle_holds_the_lock(tmp_path):
    first, second = opened(tmp_path / "file"), opened(tmp_path / "file")
    assert systems.lock(first)
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=systems.heritable(first)
    )
    os.close(first)
    assert not systems.lock(second)
    child.communicate(b"\n")
    assert systems.lock(second)
    os.close(second)


@pytest.mark.usefixtures("_both")
def test_space_is_taken_or_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    systems.take_space(path, 3 * 2**20 + 5)
    assert path.stat().st_size == 3 * 2**20 + 5
    if not WINDOWS:
        assert path.stat().st_blocks * 512 >= 3 * 2**20
    with pytest.raises(OSError, match="space|large") as error:
        systems.take_space(path, 2**60)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert path.stat().st_size == 3 * 2**20 + 5


def test_a_child_holds_a_lock_where_it_can(monkeypatch):
    assert systems.heritable(None) == ()
    assert systems.heritable(7) == (() if WINDOWS else (7,))
    lock_as_there(monkeypatch)
    assert systems.heritable(7) == ()


def test_memory_is_counted_in_bytes_where_the_system_tells_it(monkeypatch):
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=1000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert systems.peak_memory() == 1_024_000
    monkeypatch.setattr(sys, "platform", "darwin")
    assert systems.peak_memory() == 1000
    monkeypatch.setitem(sys.modules, "resource", None)
    assert systems.peak_memory() is None


def test_what_tells_a_run_to_end_is_there():
    assert signal.SIGTERM in systems.ENDING
    assert len(systems.ENDING) == 2
    assert not hasattr(os, "EX_TEMPFAIL") or os.EX_TEMPFAIL == systems.TRY_AGAIN


def test_float64_goes_to_the_cpu_from_one_kind_of_device_alone():
    for kind, home in (("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")):
        assert systems.wide_device(torch.device(kind)) == torch.device(home)
    x = torch.ones(3)
    assert systems.widenable(x) is x


def command(*words, **options):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.windows", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT.parents[1]), *sys.path])},
        capture_output=True, text=True, encoding="utf-8", check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.usefixtures("one_thread")
def test_without_what_windows_lacks_a_run_and_its_predictions_are_the_same(workdir, run):
    folder = make_folder(workdir / "images")
    words = [*fast(folder, epochs=1), "--seed_everything=0"]
    words += ["--trainer.callbacks+=SaveOnSignal", "--trainer.callbacks.every_n_steps=2"]
    command("fit", *words)
    shutil.move("runs", "theirs")
    run("fit", *words)
    curves = [list(csv.DictReader((workdir / f"{place}/t/version_0/metrics.csv").read_text("utf-8").splitlines()))
              for place in ("theirs", "runs")]  # fmt: skip
    key = "val/auroc"
    assert [row[key] for row in curves[0]] == [row[key] for row in curves[1]]
    assert [row[key] for row in curves[0] if row[key]]
    checkpoint = next((workdir / "theirs").rglob("last*.ckpt"))
    predict = ["predict", f"--ckpt_path={checkpoint}", "--trainer.accelerator=cpu", "--data.eval_batch_size=4"]
    predict += ["--trainer.enable_progress_bar=false", f"--data.images={folder / 'test'}", "--data.num_workers=1"]
    command(*predict, "--trainer.default_root_dir=theirs/predicted")
    run(*predict, "--trainer.default_root_dir=predicted")
    one, other = (next(place.rglob("predictions.jsonl")) for place in (workdir / "theirs", workdir / "predicted"))
    assert one.read_bytes() == other.read_bytes()
    assert len(one.read_text("utf-8").splitlines()) == 13
    assert not list(workdir.rglob(".panda-*"))


def trees():
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))


def test_only_one_module_asks_for_what_some_systems_lack():
    lacking = {name for names in LACKING.values() for name in names} | {"SIGKILL", "O_NONBLOCK", "getuid", "geteuid"}
    found = set()
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                found |= {(name, module) for module in modules if module in (*MODULES, "msvcrt")}
            if isinstance(node, ast.Attribute) and (
                node.attr in lacking or ast.unparse(node) in ("sys.platform", "os.name")
            ):
                found.add((name, node.attr))
    assert {name for name, _ in found} == {"runtime/systems.py"}
    assert {"fcntl", "msvcrt", "resource", "posix_fallocate", "platform"} == {what for _, what in found}


def test_text_files_are_utf8_on_every_system():
    """Ruff's rule knows only what it sees to be a Path."""
    wrong, seen = [], 0
    for name, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = [*map(ast.unparse, node.args), *(f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords)]
            text = {"read_text": True, "write_text": True}.get(node.func.attr, False)
            if node.func.attr == "open":  # of a path: the mode comes first, or there is none
                first = node.args[0] if node.args else None
                mode = str(first.value) if isinstance(first, ast.Constant) else ""
                text = "b" not in mode and set(mode) <= set("rwax+") and (bool(mode) or not given)
            seen += text
            if text and not any("utf-8" in one for one in given):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong
    assert seen > 20


def test_memory_of_a_device(monkeypatch, tmp_path):
    lines = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\nHugePages_Total:       0\n"
    (tmp_path / "meminfo").write_text(lines)
    monkeypatch.setattr(systems, "MEMORY", tmp_path / "meminfo")
    assert systems.memory_of(torch.device("cpu")) == (9000 * 1024, 16000 * 1024)
    assert systems.memory_of(torch.device("mps")) is None
    monkeypatch.setattr(systems, "MEMORY", tmp_path / "none")
    assert systems.memory_of(torch.device("cpu")) is None
    for name, value in (("mem_get_info", (10, 100)), ("memory_reserved", 7), ("memory_allocated", 3)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert systems.memory_of(torch.device("cuda", 0)) == (14, 100)
