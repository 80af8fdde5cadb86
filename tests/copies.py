"""Processes that begin as copies of one that has imported everything: starting Python anew takes seconds."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from tests.windows import WINDOWS

METHOD = "spawn" if WINDOWS else "forkserver"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["panda_lightning.tables.rows", "tests.ranks"])


def started(function: Callable[..., None], *args: Any, **environment: str) -> Any:
    """A process of one thread that calls a function."""
    process = CONTEXT.Process(target=_call, args=(function, args, os.getcwd(), {**os.environ, **environment}))
    process.start()
    return process


def ended(*processes: Any) -> None:
    """Wait for processes, all of which must end well."""
    for process in processes:
        process.join(timeout=300)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def _call(function: Callable[..., None], args: Any, folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    torch.set_num_threads(1)
    function(*args)
    os._exit(0)  # Python takes seconds to let go of all that was imported
