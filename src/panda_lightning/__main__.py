"""The commands ``lightning`` and ``panda``; ``python -m panda_lightning`` is the former."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def lightning() -> None:
    """Run ``lightning fit | validate | test | predict``."""
    with _imports():
        from panda_lightning.cli import main
    main()


def panda() -> int:
    """Run one of the tools; returns the exit status."""
    with _imports():
        from panda_lightning.tools import main
    return main()


@contextmanager
def _imports() -> Iterator[None]:
    """Let nothing search for garbage, which takes a sixth of the time of imports, and nothing search in them later."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    lightning()
