"""Windows as far as it can be had elsewhere: its locks are played, and what it lacks is taken away.

``python -m tests.windows fit --config ...`` is the command line there. What other packages look for by the system's
name, such as ``signal.SIGKILL``, stays.
"""

import os
import signal
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

WINDOWS = os.name == "nt"
LACKING = {
    os: ("EX_TEMPFAIL", "fork", "forkpty", "killpg", "mkfifo", "posix_fallocate", "sched_getaffinity", "statvfs"),
    signal: ("SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2"),
}
MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
FAR = 2**31 - 1


def msvcrt() -> Any:
    """The lock of one byte that Python's module of this name offers there."""
    import fcntl

    def locking(handle: int, mode: int, count: int) -> None:
        assert (os.lseek(handle, 0, os.SEEK_CUR), mode, count) == (FAR, module.LK_NBLCK, 1)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(13, "Permission denied") from error

    module: Any = ModuleType("msvcrt")
    module.LK_NBLCK, module.locking = 2, locking
    return module


def lock_as_there(patch: pytest.MonkeyPatch) -> None:
    """Let locks be those of Windows, and space be taken without ``posix_fallocate``."""
    from panda_lightning.runtime import systems

    if not WINDOWS:
        patch.setattr(systems, "_msvcrt", msvcrt())
        patch.setattr(systems, "_fcntl", None)
        patch.delattr(os, "posix_fallocate", raising=False)


def become() -> None:
    """Take from this process what Windows lacks."""
    import multiprocessing

    import pytorch_lightning.trainer.connectors.signal_connector as lightning

    lightning._IS_WINDOWS = True
    lightning._SignalConnector._valid_signals = staticmethod(lambda: {signal.SIGINT, signal.SIGTERM})
    locks = msvcrt()
    sys.modules.update(dict.fromkeys(MODULES))  # whoever imports one from now on fails
    for module, names in LACKING.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    multiprocessing.set_start_method("spawn")
    sys.modules["msvcrt"] = locks
    import_module("panda_lightning.runtime.systems")
    del sys.modules["msvcrt"]  # others would take it for a sign of Windows


if __name__ == "__main__":
    if not WINDOWS:
        become()
    from panda_lightning.cli import main

    main(sys.argv[1:])
