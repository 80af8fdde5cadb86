"""Checkpoint files: written whole or not at all, in one pass; a broken one is refused."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from panda_lightning.runtime.systems import REPLACES_OPEN_FILES
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import PandaError, UnwritableError

FORMAT = 3  # of a detector's extra state; another number where what is kept there changes its meaning
READ = (2, FORMAT)  # where it has changed for one method, that method refuses the older one


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames, so that a killed run leaves the old checkpoint or the new one.

    Lightning does the same by way of a copy in memory, which takes twice as long (experiments/RESULTS.md), and is still
    used for addresses of remote storage.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with new_file(path) as part:
                torch.save(checkpoint, part)
        except (OSError, RuntimeError) as error:  # torch's writer says so where a disk is full
            kept = newest_whole(path.parent)
            advice = f"Free disk space and resume with --ckpt_path {kept}." if kept else "There is no earlier one."
            free = shutil.disk_usage(path.parent).free / 2**20
            raise UnwritableError(
                f"the checkpoint {path} could not be written ({_first_line(error)}; {free:.1f} MiB are free). {advice}"
            ) from error

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        require_whole(path)
        with tensors_alone(path):
            checkpoint: dict[str, Any] = super().load_checkpoint(
                path,
                *args,
                **{**kwargs, "weights_only": True},  # which Lightning leaves out for addresses
            )
        return checkpoint


def write_whole(trainer: Any) -> None:
    """Let a Trainer write checkpoints so, unless the user has given it a plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()


def read_tensors(path: str | Path, device: torch.device | str = "cpu", mmap: bool = False) -> Any:
    """What torch saved in a file, if it is tensors and primitives alone: nothing in the file is ever run.

    Args:
        path: The file.
        device: Where tensors go.
        mmap: Read of it what is used, when it is; all at once where the file could then not be replaced.

    Raises:
        PandaError: If it cannot be read, or holds anything else.
    """
    with tensors_alone(path):
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap and REPLACES_OPEN_FILES)


@contextmanager
def tensors_alone(path: Any) -> Iterator[None]:
    """Turn torch's advice to run what is in a file into a refusal."""
    try:
        yield
    except (OSError, PandaError):
        raise
    except Exception as error:  # a file that is no pickle makes the unpickler raise nearly anything
        wrong = re.search(r"(GLOBAL|Unsupported \w+|global) ([\w.]+\.[\w.]+)", str(error))
        reason = f"it asks to run {wrong[2]}" if wrong else "torch cannot read it"
        raise PandaError(
            f"{path} is refused, because it may contain only tensors and primitives ({reason})."
        ) from error


def checkpoint_folder(trainer: pl.Trainer) -> Path:
    """Where a run's checkpoints are; every process must call it."""
    own = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(own or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")


def save_beside(trainer: pl.Trainer) -> None:
    """Save network and bank as ``last.ckpt`` of a run's log, beside others, never over them.

    Where there is one, it is last-v1.ckpt, last-v2.ckpt, ..., as Lightning's ModelCheckpoint counts. A run without a
    log saves nothing. Every process must call it.
    """
    folder = trainer.log_dir  # asks all processes
    if not folder:
        return
    first = Path(folder) / "checkpoints" / "last.ckpt"
    later = (first.with_stem(f"{first.stem}-v{n}") for n in count(1))
    path = trainer.strategy.broadcast(next(path for path in chain([first], later) if not path.exists()))
    trainer.save_checkpoint(path, weights_only=True)
    rank_zero_info(f"Network and bank saved in {path}")


def require_whole(path: str | Path) -> None:
    """Refuse a checkpoint that is cut off, changed or none at all.

    Raises:
        PandaError: Naming the newest whole one of its folder.
    """
    path = Path(path)
    fault = _fault(path) if path.is_file() else None
    if fault is not None:
        kept = newest_whole(path.parent)
        advice = (
            f"The newest complete one in its folder is {kept}." if kept else "There is no complete one in its folder."
        )
        raise PandaError(f"the checkpoint {path} is broken ({fault}). {advice}")


def require_format(checkpoint: Any) -> dict[str, Any]:
    """The extra state of a detector's checkpoint (see Detector.get_extra_state).

    Raises:
        PandaError: If it has none, or one of another format.
    """
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    state = weights.get("_extra_state") if isinstance(weights, dict) else None
    number = state.get("format") if isinstance(state, dict) else None
    if number not in READ:
        what = f"has format {number}" if number else "has no format number: it is not from this project, or too old"
        raise PandaError(
            f"the checkpoint {what}; this version reads format {FORMAT}. Train again, or use the version that wrote it."
        )
    found: dict[str, Any] = state  # type: ignore[assignment]  # a dictionary, for it has that number
    return found


def newest_whole(*folders: Path, suits: Callable[[Path], bool] = lambda path: True) -> Path | None:
    """The newest checkpoint of these folders that ``suits``; a warning names those that are newer and broken."""
    paths = [path for folder in folders for path in folder.glob("*.ckpt")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        fault = _fault(path)
        if fault is not None:
            rank_zero_warn(f"The checkpoint {path} is broken ({fault}) and is skipped.")
        elif suits(path):
            return path
    return None


def _fault(path: Path) -> str | None:
    """What is wrong with a file as a checkpoint; None if all its checksums agree."""
    try:
        with ZipFile(path) as file:
            checked = any(entry.CRC for entry in file.infolist())  # torch can be told to leave checksums out
            bad = file.testzip() if checked else None
    except (BadZipFile, EOFError, OSError) as error:
        return _first_line(error)
    return None if bad is None else f"{bad} does not match its checksum"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
