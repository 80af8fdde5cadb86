"""Rows of all processes, in the order of their index."""

from collections.abc import Sequence

import torch
from torch import Tensor

from panda_lightning.runtime.processes import objects_of_each, parts_of_each, world_size
from panda_lightning.types import PandaError


def gather(parts: Sequence[tuple[Tensor, ...]], merged: bool = True) -> tuple[Tensor, ...]:
    """Merge rows over batches and processes, in the order of their index, every index once; every process must call it.

    Args:
        parts: For each batch (index (B,), values (B, ...), ...); rows of index -1 are dropped. Processes may hold
            different numbers of rows, or no batch.
        merged: False leaves out the rows of other processes.

    Returns:
        (index (N,), values (N, ...), ...), where merged the same on every process, on the devices where they lay.

    Raises:
        PandaError: If no process has a batch.
    """
    columns: tuple[Tensor, ...] = (
        tuple(torch.cat(column) for column in zip(*parts, strict=True)) if len(parts) != 1 else parts[0]
    )
    columns = _exchange(columns, merged)
    index = columns[0]
    if len(index) and bool((index > torch.cat([index.new_full((1,), -1), index[:-1]])).all()):
        return columns  # so it is without other processes: nothing to copy
    order = torch.argsort(index, stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    keep = order[first & (index >= 0)]
    return tuple(column[keep] for column in columns)


def _exchange(columns: tuple[Tensor, ...], merged: bool) -> tuple[Tensor, ...]:
    """Rows of all processes, or its own; a process without a batch learns the columns' form from the others."""
    forms = objects_of_each([(len(c), tuple(c.shape[1:]), c.dtype, c.device.type) for c in columns])
    full = next((form for form in forms if form), None)
    if full is None:
        raise PandaError("no images were seen: the loader gave no batch.")
    if world_size() == 1 or (columns and not merged):
        return columns
    columns = columns or tuple(torch.empty((0, *shape), dtype=dtype, device=kind) for _, shape, dtype, kind in full)
    if not merged:
        return columns
    counts = [form[0][0] if form else 0 for form in forms]
    gathered = []
    for column in columns:
        padded = column.new_zeros((max(counts), *column.shape[1:]))
        padded[: len(column)] = column
        everyone = zip(parts_of_each(padded), counts, strict=True)
        gathered.append(torch.cat([rows[:count] for rows, count in everyone]))
    return tuple(gathered)
