"""What a run does once for all that need it: a line in the log, which `panda table` counts too."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pytorch_lightning.utilities import rank_zero_info


class Work(NamedTuple):
    """What was done with how many images, and how long it took."""

    verb: str
    what: str
    images: int
    seconds: float


@contextmanager
def done(verb: str, what: str, images: int) -> Iterator[None]:
    """Say how many images were worked on and how long it took; handlers of the log find it as ``record.work``."""
    begin = time.perf_counter()
    yield
    work = Work(verb, what, images, time.perf_counter() - begin)
    rank_zero_info(f"{images} {what} images {verb} in {work.seconds:.1f} s.", extra={"work": work})
