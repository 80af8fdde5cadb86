"""How many processes there are, and what each of them has: the one place that sends tensors.

A tensor is sent on the device that the processes' backend takes (NCCL takes those of GPUs alone), and what comes back
lies where it lay before, so nobody else need know of backends.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes; 1 where none were started together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def parts_of_each(tensor: Tensor) -> list[Tensor]:
    """Tensors of one shape, one of each process; every process must call it."""
    sent = _sendable(tensor).contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return [part.to(tensor.device) for part in parts]


def of_each(tensor: Tensor) -> Tensor:
    """The same as one tensor, (world, ...)."""
    return torch.stack(parts_of_each(tensor))


def sum_of_all(tensor: Tensor) -> Tensor:
    """The sum over all processes of a tensor of one shape; every process must call it."""
    if world_size() == 1:
        return tensor
    total = _sendable(tensor).clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def objects_of_each(thing: Any) -> list[Any]:
    """Primitives of each process; every process must call it. Tensors in them would come out on their sender's GPU."""
    found = [thing] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, thing)
    return found


def _sendable(tensor: Tensor) -> Tensor:
    place = {"nccl": "cuda", "gloo": "cpu"}.get(str(dist.get_backend()))  # others have a backend for each device
    return tensor if place is None else tensor.to(place)
