"""Several processes: each thing is done once, and nothing goes on when the first process ends."""

import os
import signal
import subprocess
import sys
import time

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
    time.sleep(60)
    return None


@pytest.mark.parametrize(("jobs", "count", "threads"), [(2, 5, 4), (9, 1, 8)])
def test_each_thing_is_done_once(jobs, count, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = list(workers.done_by(jobs, squared, range(count)))
    assert sorted(found) == [(n * n, threads) for n in range(count)]


def test_nothing_to_do_starts_no_process():
    assert list(workers.done_by(2, squared, [])) == []


@pytest.mark.parametrize(("number", "status"), [("killed", 137), ("ended", 75)])
def test_a_process_that_ends_ends_the_others(number, status):
    begin = time.monotonic()
    with pytest.raises(SystemExit) as end:
        list(workers.done_by(2, squared, [number, "slow"]))
    assert end.value.code == status
    assert time.monotonic() - begin < 50


def test_an_error_is_that_of_the_process():
    with pytest.raises(PandaError, match="no such number"):
        list(workers.done_by(2, squared, [1, "refused"]))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows ends processes without a signal")
def test_a_signal_ends_all_of_them():
    code = (
        "from panda_lightning.tables.workers import done_by; from tests.tables.test_workers import squared\n"
        "for found in done_by(2, squared, [1, 'slow', 'slow']): print(found, flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline().startswith(b"(1,")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=50) == 143
    assert process.stdout.read() == b""  # closed by the last process that held it
    assert time.monotonic() - begin < 50


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
