"""Weights as checkpoints hold them, where Lightning averages those of many steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.callbacks import WeightAveraging


@contextmanager
def as_saved(trainer: Any, module: Any) -> Iterator[None]:
    """Give a module the weights that a checkpoint would hold, which WeightAveraging does for validations."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    for average in averages:
        average.on_validation_epoch_start(trainer, module)
    yield
    for average in averages:
        average.on_validation_epoch_end(trainer, module)
