"""Every image passes the frozen layers once: what comes out is kept in memory or in a file."""

import math
import shutil
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from panda_lightning.networks.backbones import Backbone
from panda_lightning.networks.checks import may_be_cached
from panda_lightning.networks.loading import made_of
from panda_lightning.runtime.features import on_device
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.sizes import in_words
from panda_lightning.runtime.systems import memory_of
from panda_lightning.runtime.whole import new_file
from panda_lightning.runtime.work import done
from panda_lightning.types import Batch, PandaError

RULE = 3  # of what is in a file; another number where the same network would give other values


def cache_prefix(
    trainer: pl.Trainer, backbone: Backbone, loader: DataLoader[Batch], budget: int, half: bool, folder: str | None
) -> int:
    """Let every image of a data set pass the frozen layers once; batches of this run then show what came out.

    It is kept on the GPU where half of its free memory holds it, else in the computer's memory, or in a file. The
    processes share the work, and each has all of it afterwards.

    Args:
        trainer: Gives device, precision and progress bar.
        backbone: Whose frozen layers.
        loader: Of an ImageDataset of the run under way: all of it in order, or this process's share.
        budget: Bytes of memory that it may take; where it needs more, the images stay.
        half: Keep float16, whatever the precision of the run.
        folder: Keep it in a file of this folder, where it is found again by the same images and layers; the budget
            then does not count, but the disk must have the space.

    Returns:
        Bytes of memory taken.
    """
    dataset: Any = loader.dataset
    if not may_be_cached(backbone, dataset):
        return 0
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
        layers = (made_of(backbone, frozen=True), backbone.pool, backbone.optimize)
        name = fingerprint(RULE, *layers, dataset, dtype, trainer.precision)
        path = Path(folder) / f"{backbone.architecture}-{name}.hidden"
        room = needed if path.is_file() else shutil.disk_usage(folder).free
    if not strategy.reduce_boolean_decision(needed <= room):
        limit = "is free in prefix_cache_dir" if path else "is left in prefix_cache_gb"
        more = "free space there" if path else "set more, or prefix_cache_dir, which needs no memory"
        rank_zero_info(
            f"{what} would take {in_words(needed)}, more than {limit} ({in_words(room)}): these images pass "
            f"through all layers each time. To avoid that, {more}."
        )
        return 0
    memory = memory_of(device) if device.type == "cuda" else None
    place = device if memory is not None and 2 * needed < memory[0] else torch.device("cpu")
    if path is None:
        hidden = torch.empty(shape, dtype=dtype, device=place)
        _fill(trainer, backbone, loader, hidden, half)
    else:
        if not strategy.reduce_boolean_decision(path.is_file() and path.stat().st_size == needed):
            if trainer.local_rank == 0:  # the other processes of this machine map the same file
                with new_file(path, needed) as part:
                    _fill(trainer, backbone, loader, _mapped(part, shape, dtype, writable=True), half)
            else:
                _fill(trainer, backbone, loader, None, half)
            strategy.barrier()
        hidden = _mapped(path, shape, dtype).to(place)
    rank_zero_info(f"{what} is cached: {in_words(needed)} {f'in {path}' if path else f'on {place}'}.")
    dataset.hidden = hidden
    return 0 if path else needed


def _fill(
    trainer: pl.Trainer, backbone: Backbone, loader: DataLoader[Batch], hidden: Tensor | None, half: bool
) -> None:
    """Each process computes its share and gives it to the others; None only helps."""
    dataset: Any = loader.dataset
    rows = loader.batch_size or 1
    what = "test" if dataset.label.any() else "normal training"
    rounds = -(-len(dataset) // (rows * trainer.world_size))  # a process may have one batch less than another
    batches: Iterator[Batch | None] = chain(loader, repeat(None))
    most = torch.zeros((), device=trainer.strategy.root_device)
    with done("passed through the frozen layers", what, len(dataset)), trainer.precision_plugin.forward_context():
        for batch in on_device(trainer, islice(batches, rounds), "Frozen layers, once", rounds):
            parts = [(batch["index"], backbone.prefix(batch["image"]))] if batch else []
            index, values = gather(parts)
            if len(values):
                most = torch.maximum(most, values.abs().amax())
            if hidden is not None:
                hidden[index.to(hidden.device)] = values.to(hidden)
    if half and float(most) > torch.finfo(torch.float16).max:
        raise PandaError(
            f"the frozen layers output values up to {float(most):.3g}, but float16 ends at 65504: leave "
            "prefix_cache_half out."
        )


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, writable: bool = False) -> Tensor:
    """A file as a tensor that is read, or written, as it is used."""
    return torch.from_file(str(path), shared=writable, size=math.prod(shape), dtype=dtype).view(shape)
