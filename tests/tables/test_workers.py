"""Several processes: each thing is done once, and nothing goes on when the first process ends."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch

from panda_lightning.tables import workers
from panda_lightning.types import PandaError


def squared(number):
    """A thing that is done, or how it goes wrong."""
    if number == "refused":
        raise PandaError("no such number: name another")
    if isinstance(number, int):
        return number**2, torch.get_num_threads()
    if number == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if number == "ended":
        sys.exit(75)
    if number == "saves":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    Path("begun").touch()
    time.sleep(60)
    return None


@pytest.mark.parametrize(("jobs", "count", "threads"), [(2, 5, 4), (9, 1, 8)])
def test_each_thing_is_done_once(jobs, count, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = list(workers.done_by(jobs, squared, range(count)))
    assert sorted(found) == [(n * n, threads) for n in range(count)]


def test_nothing_to_do_starts_no_process():
    assert list(workers.done_by(2, squared, [])) == []


@pytest.mark.parametrize(
    ("number", "end", "said"), [("killed", PandaError, "by signal 9"), ("ended", SystemExit, "75")]
)
@pytest.mark.usefixtures("workdir")
def test_a_process_that_ends_ends_the_others(number, end, said):
    begin = time.monotonic()
    with pytest.raises(end, match=said):
        list(workers.done_by(2, squared, [number, "slow"]))
    assert time.monotonic() - begin < 50


def test_an_error_is_that_of_the_process():
    with pytest.raises(PandaError, match="no such number"):
        list(workers.done_by(2, squared, [1, "refused"]))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows ends processes without a signal")
@pytest.mark.parametrize(("name", "thing", "status"), [("SIGTERM", "slow", 143), ("SIGUSR1", "saves", 75)])
def test_a_signal_ends_all_of_them(workdir, name, thing, status):
    def tell():
        while not (workdir / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), getattr(signal, name))

    before, begin = signal.getsignal(getattr(signal, name)), time.monotonic()
    Thread(target=tell, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        list(workers.done_by(2, squared, [thing, thing, thing]))
    assert end.value.code == status  # 75 only where one saved
    assert time.monotonic() - begin < 50
    assert not multiprocessing.active_children()
    assert signal.getsignal(getattr(signal, name)) == before


@pytest.mark.parametrize(
    ("visible", "count", "jobs", "expected"),
    [
        (None, 0, 2, [None, None]),
        (None, 1, 2, ["0", "0"]),
        (None, 4, 2, ["0,2", "1,3"]),
        ("4,5", 2, 2, ["4", "5"]),
        ("4,5", 2, 3, ["4", "5", "4"]),
    ],
)
def test_gpus_are_shared_out(visible, count, jobs, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpus for _, gpus in workers._shares(jobs)] == expected
