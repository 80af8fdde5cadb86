"""Features of every image of a loader, merged over processes, in the order of the data set."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.progress import Progress
from torch import Tensor

from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.systems import widenable
from panda_lightning.types import Batch

T = TypeVar("T")


@torch.no_grad()
def extract(
    trainer: pl.Trainer,
    embed: Callable[[Batch], Tensor],
    loader: Iterable[Batch],
    title: str,
    merged: bool = True,
    dtype: torch.dtype = torch.float32,
    finish: Callable[[], None] = lambda: None,
) -> Tensor:
    """Embed every image of a data set once, each process its share.

    Args:
        trainer: Gives device, precision and progress bar.
        embed: Batch -> (B, ...) features.
        loader: Batches of this process; together the processes hold every index of the data set.
        title: What the progress bar says.
        merged: Whether every process gets the features of all, or keeps those of its own images.
        dtype: Of what is kept.
        finish: What a process calls when it has no more images.

    Returns:
        (N, ...) on the trainer's device (float64 where that has it, see runtime/systems.py), in the order of the index.
    """
    with trainer.precision_plugin.forward_context():
        parts = []
        for batch in on_device(trainer, loader, title):
            values = embed(batch)
            values = (widenable(values) if dtype == torch.float64 else values).to(dtype)
            parts.append((batch["index"].to(values.device), values))
        finish()
    _, features = gather(parts, merged)
    return features


def on_device(trainer: pl.Trainer, loader: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Batches on the trainer's device, with a progress bar that may stand below Lightning's own.

    Args:
        trainer: Its device, and whether it shows progress.
        loader: Batches of this process.
        title: What the bar says.
        total: How many batches, where the loader has no length.
    """
    bar: Any = trainer.progress_bar_callback
    silent = bar is None or bar.is_disabled or not trainer.is_global_zero
    # Lightning's bar stops the clock that would refresh one below it, so this one refreshes at each batch
    with Progress(transient=True, disable=silent, auto_refresh=False) as progress:
        for batch in progress.track(loader, total, description=title):
            if trainer.received_sigterm:  # which Lightning looks for in its own loops
                raise SIGTERMException
            yield trainer.strategy.batch_to_device(batch)
