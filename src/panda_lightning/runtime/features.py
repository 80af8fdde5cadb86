"""Features of every image of a loader, merged over processes, in the order of the data set."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.progress import Progress
from torch import Tensor

from panda_lightning.runtime.processes import world_size
from panda_lightning.types import Batch, PandaError

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
        (N, ...) on the trainer's device, in the order of the index.
    """
    with trainer.precision_plugin.forward_context():
        parts = [(batch["index"], embed(batch).to(dtype)) for batch in on_device(trainer, loader, title)]
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


def gather(parts: Sequence[tuple[Tensor, ...]], merged: bool = True) -> tuple[Tensor, ...]:
    """Merge rows over batches and processes, in the order of their index, every index once; every process must call it.

    Args:
        parts: For each batch (index (B,), values (B, ...), ...); rows of index -1 are dropped. Processes may hold
            different numbers of rows, or no batch.
        merged: False leaves out the rows of other processes.

    Returns:
        (index (N,), values (N, ...), ...), where merged the same on every process.

    Raises:
        PandaError: If no process has a batch.
    """
    columns: tuple[Tensor, ...] = (
        tuple(torch.cat(column) for column in zip(*parts, strict=True)) if len(parts) != 1 else parts[0]
    )
    columns = _exchange(columns, merged)
    index = columns[0]
    if len(index) and index[0] >= 0 and bool((index[1:] > index[:-1]).all()):
        return columns  # so it is without other processes: nothing to copy
    order = torch.argsort(index, stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    keep = order[first & (index >= 0)]
    return tuple(column[keep] for column in columns)


def _exchange(columns: tuple[Tensor, ...], merged: bool) -> tuple[Tensor, ...]:
    """Rows of all processes, or its own; a process without a batch learns the columns' form from the others."""
    mine = [(len(c), tuple(c.shape[1:]), c.dtype) for c in columns]
    forms: list[Any] = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(forms, mine)
    full = next((form for form in forms if form), None)
    if full is None:
        raise PandaError("no images were seen: the loader gave no batch.")
    if world_size() == 1 or (columns and not merged):
        return columns
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    columns = columns or tuple(torch.empty((0, *shape), dtype=dtype, device=device) for _, shape, dtype in full)
    if not merged:
        return columns
    counts = [form[0][0] if form else 0 for form in forms]
    gathered = []
    for column in columns:
        padded = column.new_zeros((max(counts), *column.shape[1:]), device=device)
        padded[: len(column)] = column
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded)
        gathered.append(torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)]))
    return tuple(gathered)
