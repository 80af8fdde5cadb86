"""What operating systems and devices differ in: locks, room on a disk, signals, memory, and float64."""

import errno
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_fcntl: Any = None
_msvcrt: Any = None
try:
    import fcntl

    _fcntl = fcntl
except ImportError:  # Windows
    import msvcrt

    _msvcrt = msvcrt
MEMORY = Path("/proc/meminfo")  # of Linux
FAR = 2**31 - 1  # a byte beyond the files that are locked: Windows lets nobody else read what is

REPLACES_OPEN_FILES = _fcntl is not None  # Windows replaces no file that is open or mapped

# what tells a run to end: USR1 of clusters, TERM, and Ctrl-Break of Windows
ENDING = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
TRY_AGAIN = 75  # the exit status of a run that is to go on; os.EX_TEMPFAIL, which Windows has not


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed, at the latest when its process ends, however it does.

    A child that inherits the handle holds the lock too; on Windows it does not, and the lock goes with its parent. File
    systems without locks let everyone have it.

    Args:
        handle: Of the file.
        wait: Until nobody else has it.

    Returns:
        Whether it is locked; False where somebody else has it, and only without ``wait``.
    """
    with suppress(OSError):
        return _lock(handle, wait)
    return True  # a file system without locks


def _lock(handle: int, wait: bool) -> bool:
    if _fcntl:
        try:
            _fcntl.flock(handle, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True
    before = os.lseek(handle, 0, os.SEEK_CUR)
    try:
        while True:
            os.lseek(handle, FAR, os.SEEK_SET)
            try:
                _msvcrt.locking(handle, _msvcrt.LK_NBLCK, 1)  # the mode that waits gives up after ten seconds
                return True
            except PermissionError:
                if not wait:
                    return False
                time.sleep(0.1)
    finally:
        os.lseek(handle, before, os.SEEK_SET)


def heritable(handle: int | None) -> tuple[int, ...]:
    """The ``pass_fds`` of a child process that is to hold a lock as long as it lives; () where none can."""
    return (handle,) if handle is not None and _fcntl else ()


def take_space(path: Path, size: int) -> None:
    """Make an empty file ``size`` bytes long, and take them on the disk now.

    Raises:
        OSError: If there are not as many.
    """
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        if size > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        zeros = bytes(1 << 20)  # a length that is merely set takes no space on macOS
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])


def peak_memory() -> int | None:
    """The most bytes that this process has held in memory; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    usage: Any = resource  # of which mypy knows no part on Windows
    peak: int = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """Bytes that are free on a device, and all that it has; None where that is not known.

    A limit that a scheduler or a container sets for a process does not count.
    """
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), whole
    if device.type != "cpu" or not MEMORY.is_file():
        return None
    lines = (line.split() for line in MEMORY.read_text("utf-8").splitlines())
    found = {words[0]: 1024 * int(words[1]) for words in lines}
    return found["MemAvailable:"], found["MemTotal:"]


def wide_device(device: torch.device) -> torch.device:
    """Where numbers of a device go to become float64: nowhere else, but to the CPU from Apple's MPS, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def widenable(tensor: Tensor) -> Tensor:
    """A tensor where it can become float64, see wide_device."""
    return tensor.to(wide_device(tensor.device))
