"""How commands end: in a sentence about what to do, without noise, and at once."""

import atexit
import errno
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from panda_lightning.types import PandaError


def refusal(error: BaseException | None) -> PandaError | None:
    """The sentence behind an error: jsonargparse wraps it, and on a full disk the report fails after the checkpoint."""
    while error is not None and not isinstance(error, PandaError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def trainer_arguments() -> Iterator[None]:
    """Say of a Trainer that cannot be made that its arguments are to blame."""
    from lightning_fabric.utilities.exceptions import MisconfigurationException  # slow to import

    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        said = " ".join(str(refusal(error) or error).split())
        raise PandaError(f"these Trainer arguments do not work here: {said}") from error


def end_in_a_sentence(error: Exception) -> NoReturn:
    """Leave with what to do about an error of the user or the machine; any other is raised, for its traceback."""
    if isinstance(error, BrokenPipeError):  # whoever reads, such as `| head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    told = refusal(error) or _sentence(error)
    if told is None:
        raise error
    sys.exit(f"error: {told}")


def _sentence(error: BaseException) -> str | None:
    """What to do about an error of the machine; None for any other."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}. Free disk space and resume with --ckpt_path last."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT):
        return f"{error}. Choose another place, or make this one readable and writable."
    if found := re.search(r"class_path '[\w.]*?(\w+Logger)':.*pip install -U '([\w-]+)", str(error), re.DOTALL):
        logger, package = found.groups()
        return (
            f"{logger} needs the package {package}, which is not installed: `pip install {package}`, or choose another "
            "logger, such as CSVLogger."
        )
    said = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or re.search("not enough memory|can't allocate memory|out of memory", said):
        return (
            f"out of memory ({said[:200].rstrip('.')}): lower data.batch_size, data.eval_batch_size, data.memory_gb, "
            "data.image_size or model.index_memory_mb."
        )
    if "ckpt_path" in said or isinstance(error, FileNotFoundError):  # Lightning looks for best, hpc and addresses
        return said
    return None


@cache
def pass_over_imports() -> None:
    """Let no search for garbage go through what imports have made: it takes a second, in a run and at its end."""
    gc.freeze()
    atexit.register(gc.freeze)


def silence() -> None:
    """Leave out what our users cannot act on, and let the rest pass through progress bars."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        log = logging.getLogger(name)
        log.handlers = [Stderr() if type(h) is logging.StreamHandler else h for h in log.handlers]
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_for_users)
    warnings.formatwarning = _in_a_line
    for message in (
        ".*in eval mode at the start of training.*",  # BatchNorm keeps its pretrained statistics
        ".*does not have many workers.*",  # decoded images lie in memory
        ".*smaller than the logging interval.*",  # everything is logged by epoch
        ".*args parameter is intended to run from within Python.*",  # words of the terminal, completed
        ".*sync_dist=True.*",  # what we log is the same on every process already
        ".*LeafSpec.*",  # inside Lightning
        ".*dirpath has changed from.*",  # a run that goes on has a folder of its own
        ".*exists and is not empty.*",  # and a checkpoint that is written again replaces the old one
    ):
        warnings.filterwarnings("ignore", message)


class Stderr(logging.StreamHandler[Any]):
    """Logs to sys.stderr as it is at the time: a progress bar puts itself there, and shows lines above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Where lines go."""
        return sys.stderr


def _is_for_users(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's says something that is not an advertisement, or said by ourselves."""
    said = record.getMessage()
    return "Tip:" not in said and not said.startswith(("TPU available: False", "`Trainer.fit` stopped: `max_epochs"))


def is_ours(filename: str) -> bool:
    """Whether a warning that comes from this file is a sentence of ours for users."""
    return Path(__file__).parents[1] in Path(filename).parents


def _in_a_line(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of ours without the place in the code; any other with it."""
    place = "" if is_ours(filename) else f" ({filename}:{lineno})"
    return f"{category.__name__ if place else 'warning'}: {message}{place}\n"
