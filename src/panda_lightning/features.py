"""Features of every image of a loader, merged over processes, in the order of the data set."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_info
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader

from panda_lightning.backbones import Backbone
from panda_lightning.types import Batch


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


def on_device(trainer: pl.Trainer, loader: Iterable[Batch], title: str) -> Iterator[Batch]:
    """Batches on the trainer's device, with a progress bar that may stand below Lightning's own.

    Args:
        trainer: Its device, and whether it shows progress.
        loader: Batches of this process.
        title: What the bar says.
    """
    bar: Any = trainer.progress_bar_callback
    silent = bar is None or bar.is_disabled or not trainer.is_global_zero
    # Lightning's bar stops the clock that would refresh one below it, so this one refreshes at each batch
    with Progress(transient=True, disable=silent, auto_refresh=False) as progress:
        for batch in progress.track(loader, description=title):
            yield trainer.strategy.batch_to_device(batch)


def cache_prefix(trainer: pl.Trainer, backbone: Backbone, loader: DataLoader[Batch], budget: int, half: bool) -> int:
    """Let every image of a data set pass the frozen layers once, and keep what comes out in the data set.

    It is kept on the GPU where half of its free memory holds it, else in the computer's memory.

    Args:
        trainer: Gives device, precision and progress bar.
        backbone: Whose frozen layers.
        loader: Of a data set with ``replace_pixels``, all of it or this process's share.
        budget: Bytes that it may take; where it needs more, the images stay.
        half: Keep float16 in place of float32.

    Returns:
        Bytes taken.
    """
    dataset: Any = loader.dataset
    everything = DataLoader(  # each process keeps all, for each epoch deals other images to it
        dataset, batch_size=64, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )
    device = trainer.strategy.root_device
    with trainer.precision_plugin.forward_context():
        one = backbone.prefix(dataset.__getitems__([0])["image"].to(device))
        dtype = torch.float16 if half else torch.float32
        needed = len(dataset) * one[0].numel() * dtype.itemsize
        if needed > budget:
            rank_zero_info(
                f"The frozen layers' output of {len(dataset)} images would take {needed / 2**30:.1f} GiB, more than is "
                f"left of prefix_cache_gb ({budget / 2**30:.1f}): these images pass all layers each time."
            )
            return 0
        place = device if device.type == "cuda" and 2 * needed < torch.cuda.mem_get_info(device)[0] else "cpu"
        hidden = torch.empty((len(dataset), *one.shape[1:]), dtype=dtype, device=place)
        for batch in on_device(trainer, everything, "Frozen layers, once"):
            hidden[batch["index"].to(place)] = backbone.prefix(batch["image"]).to(place, dtype)
    rank_zero_info(f"The frozen layers' output of {len(dataset)} images is kept: {needed / 2**20:.0f} MiB on {place}.")
    dataset.replace_pixels(hidden)
    return needed


def gather(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Merge rows over batches and processes, in the order of their index, every index once.

    Args:
        parts: For each batch (index (B,), values (B, ...), ...); rows of index -1 are dropped. Processes may hold
            different numbers of rows, or none.

    Returns:
        (index (N,), values (N, ...), ...), the same on every process.
    """
    columns: tuple[Tensor, ...] = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        columns = _all_gather(columns)
    index = columns[0]
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
