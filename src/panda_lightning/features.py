"""Features of every image of a loader, merged over processes, in the order of the data set."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_info
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader

from panda_lightning.backbones import Backbone
from panda_lightning.fingerprint import fingerprint
from panda_lightning.types import Batch

T = TypeVar("T")


@torch.no_grad()
def extract(trainer: pl.Trainer, embed: Callable[[Batch], Tensor], loader: Iterable[Batch], title: str) -> Tensor:
    """Embed every image of a data set once, each process its share.

    Args:
        trainer: Gives device, precision and progress bar.
        embed: Batch -> (B, D) features.
        loader: Batches of this process; together the processes hold every index of the data set.
        title: What the progress bar says.

    Returns:
        (N, D) float32 on the trainer's device, row i for index i, the same on every process.
    """
    with trainer.precision_plugin.forward_context():
        parts = [(batch["index"], embed(batch).float()) for batch in on_device(trainer, loader, title)]
    _, features = gather(parts)
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
            yield trainer.strategy.batch_to_device(batch)


def cache_prefix(
    trainer: pl.Trainer, backbone: Backbone, loader: DataLoader[Batch], budget: int, half: bool, folder: str | None
) -> int:
    """Let every image of a data set pass the frozen layers once, and keep what comes out in the data set.

    It is kept on the GPU where half of its free memory holds it, else in the computer's memory, or in a file. The
    processes share the work, and each has all of it afterwards.

    Args:
        trainer: Gives device, precision and progress bar.
        backbone: Whose frozen layers.
        loader: Of a data set with ``replace_pixels``: all of it in order, or this process's share.
        budget: Bytes of memory that it may take; where it needs more, the images stay.
        half: Keep float16, whatever the precision of the run.
        folder: Keep it in a file of this folder, where it is found again by the same images and layers; the budget
            then does not count, but the disk must have the space.

    Returns:
        Bytes of memory taken.
    """
    dataset: Any = loader.dataset
    strategy = trainer.strategy
    device = strategy.root_device
    with trainer.precision_plugin.forward_context():
        one = backbone.prefix(dataset.__getitems__([0])["image"].to(device))
    dtype = torch.float16 if half else one.dtype  # bfloat16 where the run computes in it: nothing more is lost
    shape, needed = (len(dataset), *one.shape[1:]), len(dataset) * one[0].numel() * dtype.itemsize
    what = f"The frozen layers' output of {len(dataset)} images"
    path, room = None, budget
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = fingerprint(backbone.frozen_state(), dataset, f"{dtype} {trainer.precision}")
        path = Path(folder) / f"{backbone.architecture}-{name}.hidden"
        room = needed if path.is_file() else shutil.disk_usage(folder).free
    if not strategy.reduce_boolean_decision(needed <= room):
        limit = "is free in prefix_cache_dir" if path else "is left of prefix_cache_gb"
        rank_zero_info(
            f"{what} would take {needed / 2**30:.1f} GiB, more than {limit} ({room / 2**30:.1f}): these images pass "
            "all layers each time."
        )
        return 0
    place = device if device.type == "cuda" and 2 * needed < torch.cuda.mem_get_info(device)[0] else torch.device("cpu")
    if path is None:
        hidden = torch.empty(shape, dtype=dtype, device=place)
        _fill(trainer, backbone, loader, hidden)
    else:
        if not strategy.reduce_boolean_decision(path.is_file()):
            if trainer.local_rank == 0:  # the other processes of this machine map the same file
                with _new_file(path, needed) as part:
                    _fill(trainer, backbone, loader, _mapped(part, shape, dtype, writable=True))
            else:
                _fill(trainer, backbone, loader, None)
            strategy.barrier()
        hidden = _mapped(path, shape, dtype).to(place)
    rank_zero_info(f"{what} is kept: {needed / 2**20:.0f} MiB {f'in {path}' if path else f'on {place}'}.")
    dataset.replace_pixels(hidden)
    return 0 if path else needed


def _fill(trainer: pl.Trainer, backbone: Backbone, loader: DataLoader[Batch], hidden: Tensor | None) -> None:
    """Each process computes its share and gives it to the others; None only helps."""
    dataset: Any = loader.dataset
    rows = loader.batch_size or 1
    rounds = -(-len(dataset) // (rows * trainer.world_size))  # a process may have one batch less than another
    batches: Iterator[Batch | None] = chain(loader, repeat(None))
    with trainer.precision_plugin.forward_context():
        for batch in on_device(trainer, islice(batches, rounds), "Frozen layers, once", rounds):
            parts = [(batch["index"], backbone.prefix(batch["image"]))] if batch else []
            index, values = gather(parts)
            if hidden is not None:
                hidden[index.to(hidden.device)] = values.to(hidden)


@contextmanager
def _new_file(path: Path, size: int) -> Iterator[Path]:
    """A file that gets its name when it is complete; its space is taken beforehand, so that the disk cannot fill up."""
    handle, name = tempfile.mkstemp(suffix=".part", dir=path.parent)  # several machines may write to one disk
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, writable: bool = False) -> Tensor:
    return torch.from_file(str(path), shared=writable, size=math.prod(shape), dtype=dtype).view(shape)


def gather(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Merge rows over batches and processes, in the order of their index, every index once.

    Args:
        parts: For each batch (index (B,), values (B, ...), ...); rows of index -1 are dropped. Processes may hold
            different numbers of rows, or none.

    Returns:
        (index (N,), values (N, ...), ...), the same on every process.
    """
    columns: tuple[Tensor, ...] = (
        tuple(torch.cat(column) for column in zip(*parts, strict=True)) if len(parts) != 1 else parts[0]
    )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        columns = _all_gather(columns)
    index = columns[0]
    if len(index) and index[0] >= 0 and bool((index[1:] > index[:-1]).all()):
        return columns  # so it is without other processes: nothing to copy
    order = torch.argsort(index, stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    keep = order[first & (index >= 0)]
    return tuple(column[keep] for column in columns)


def _all_gather(columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows of all processes, whatever number each has; a process without rows learns their form from the others."""
    forms: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(forms, [(len(c), tuple(c.shape[1:]), c.dtype) for c in columns])
    full = next(form for form in forms if form)
    counts = [form[0][0] if form else 0 for form in forms]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    gathered = []
    for i, (_, shape, dtype) in enumerate(full):
        mine = columns[i] if columns else torch.empty((0, *shape), dtype=dtype)
        padded = torch.zeros((max(counts), *shape), dtype=dtype, device=device)
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded)
        gathered.append(torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)]))
    return tuple(gathered)
