"""How many processes there are, and a tensor of each."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes; 1 where none were started together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_each(tensor: Tensor) -> Tensor:
    """Tensors of one shape, (world, ...), one of each process; every process must call it."""
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)
