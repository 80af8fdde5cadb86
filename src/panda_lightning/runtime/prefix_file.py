"""Files of the prefix cache: several processes and machines may write into one folder."""

import fcntl
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


@contextmanager
def new_file(path: Path, size: int) -> Iterator[Path]:
    """A file that gets its name when it is complete; its space is taken beforehand, so that the disk cannot fill up."""
    _remove_orphans(path.parent)
    handle, name = tempfile.mkstemp(suffix=".part", dir=path.parent)  # several machines may write to one disk
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # as long as this process lives
            os.posix_fallocate(file.fileno(), 0, size)
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remove_orphans(folder: Path) -> None:
    """Files that killed processes left unfinished: nobody holds their lock, and they are not of this minute."""
    for part in folder.glob("*.part"):
        try:
            with part.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(file.fileno()).st_mtime > 60:
                    part.unlink()
        except OSError:
            continue  # somebody's, or gone by now


def mapped_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype, writable: bool = False) -> Tensor:
    """A file as a tensor that is read, or written, as it is used."""
    return torch.from_file(str(path), shared=writable, size=math.prod(shape), dtype=dtype).view(shape)
