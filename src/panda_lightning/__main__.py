"""The commands ``lightning`` and ``panda``; ``python -m panda_lightning`` is the former."""

import gc
from importlib import import_module
from typing import Any


def lightning() -> None:
    """Run ``lightning fit | validate | test | predict``."""
    _imported("panda_lightning.cli").main()


def panda() -> int:
    """Run one of the tools; returns the exit status."""
    status: int = _imported("panda_lightning.tools").main()
    return status


def _imported(name: str) -> Any:
    """A module; nothing searches for garbage meanwhile, which would take a sixth of the time, or in it later."""
    gc.disable()
    module = import_module(name)
    gc.freeze()
    gc.enable()
    return module


if __name__ == "__main__":
    lightning()
