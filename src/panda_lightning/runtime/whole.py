"""Files and folders that appear whole or not at all, whoever else writes into the same place at the same time."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from pytorch_lightning.utilities import rank_zero_info

from panda_lightning.types import PandaError

ORPHANED = 60  # seconds after which what nobody holds was left by a killed process


@contextmanager
def new_file(path: Path, size: int = 0) -> Iterator[Path]:
    """A file that gets its name, in place of an older one, when it is complete; it goes if that fails.

    Args:
        path: Its name; the folder is made if need be.
        size: Bytes to take beforehand, so that the disk cannot fill up on the way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path.parent)
    try:
        with part.open("xb") as file:
            _hold(file.fileno())
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A folder to fill, whose contents are then renamed into ``parent``; what is left in it goes."""
    parent.mkdir(parents=True, exist_ok=True)
    part = _part(parent)
    part.mkdir()
    handle = os.open(part, os.O_RDONLY)
    try:
        _hold(handle)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


def require_new(*paths: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        PandaError: Naming it.
    """
    for path in paths:
        if path.exists():
            raise PandaError(f"{path} exists: choose another --output, or remove it.")


def require_folder(name: str, folder: str | Path) -> None:
    """Make a folder, and find out now whether files can be written there.

    Args:
        name: What the folder is called.
        folder: It.

    Raises:
        PandaError: If not.
    """
    try:
        with new_folder(Path(folder)):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise PandaError(f"{name}={folder} cannot be written to ({reason}): choose another folder.") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make something in a folder; others, on other machines too, wait.

    File systems without locks let all of them in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rank_zero_info(f"Another process is making files in {folder}: waiting for it.")
            _hold(handle)
        except OSError:
            pass
        yield
    finally:
        os.close(handle)  # which also gives the lock back


@contextmanager
def held(path: Path) -> Iterator[int | None]:
    """A file's handle where this process now has it to itself, None where somebody else has it.

    It is held to the end of the block, or as long as a process lives that inherited the handle. File systems without
    locks let all of them have it.
    """
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError:
            pass
        yield handle
    finally:
        os.close(handle)


def _hold(handle: int) -> None:
    """Lock as long as this process lives, so that others know that it does."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)


def _part(folder: Path) -> Path:
    """A name that nobody else has; what killed processes left under such names goes."""
    for part in folder.glob(".panda-*"):
        with suppress(OSError):  # somebody's, or gone by now
            handle = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle).st_mtime > ORPHANED:
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(handle)
    return folder / f".panda-{uuid4().hex}.part"
