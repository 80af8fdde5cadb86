"""Files and folders that appear whole or not at all, whoever else writes into the same place at the same time."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from pytorch_lightning.utilities import rank_zero_info

from panda_lightning.runtime.systems import lock, take_space
from panda_lightning.types import PandaError

LOCK, PART = ".panda.lock", "new.part"  # names: of who is at work in a folder, and of what is not complete yet
ORPHANED = 60  # seconds after which what nobody holds was left by a killed process


@contextmanager
def new_file(path: Path, size: int = 0) -> Iterator[Path]:
    """A file that gets its name, in place of an older one, when it is complete; it goes if that fails.

    Args:
        path: Its name; the folder is made if need be.
        size: Bytes to take beforehand, so that the disk cannot fill up on the way.

    Raises:
        OSError: If that cannot be; on Windows also where somebody reads or maps the older one at that moment.
    """
    with _place(path.parent) as place:
        part = place / PART
        part.touch(exist_ok=False)
        if size:
            take_space(part, size)
        yield part
        part.replace(path)


@contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A folder to fill, whose contents are then renamed into ``parent``; what is left in it goes."""
    with _place(parent) as place:
        part = place / PART
        part.mkdir()
        yield part


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

    File systems without locks let all of them in, and so does a folder that cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(OSError):
            if stack.enter_context(held(folder / LOCK)) is None:
                rank_zero_info(f"Another process is writing files in {folder}: waiting for it.")
                stack.enter_context(held(folder / LOCK, wait=True))
        yield


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[int | None]:
    """A file's handle where this process now has it to itself, None where somebody else has it.

    It is held to the end of the block, or as long as a process lives that inherited the handle (not on Windows, see
    ``lock``). File systems without locks let all of them have it.

    Args:
        path: The file, which is made if need be, and stays.
        wait: Until nobody else has it.
    """
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        yield handle if lock(handle, wait) else None
    finally:
        os.close(handle)  # which also gives the lock back


@contextmanager
def _place(folder: Path) -> Iterator[Path]:
    """A folder in another that nobody else has, and that goes at the end; what killed processes left there goes too."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in folder.glob(".panda-*"):
        with suppress(OSError):  # somebody's, or gone by now
            if _orphaned(place):
                shutil.rmtree(place, ignore_errors=True)
    place = folder / f".panda-{uuid4().hex}"
    place.mkdir()
    try:
        with held(place / LOCK, wait=True):  # so that others know that this process lives
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)  # after the lock has gone: Windows keeps files that are open


def _orphaned(place: Path) -> bool:
    """Whether a killed process left it."""
    touched = [place.stat().st_mtime]
    with suppress(FileNotFoundError):
        touched.append((place / PART).stat().st_mtime)
    old = time.time() - max(touched) > ORPHANED
    try:
        handle = os.open(place / LOCK, os.O_RDWR)  # not made anew: its owner may be removing the folder
    except FileNotFoundError:  # the process was killed before it could lock
        return old
    try:
        return lock(handle) and old
    finally:
        os.close(handle)
