"""Short names for weights, images and settings, so that what was made from them is found again and only then."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits made of all that is given.

    Args:
        parts: Tensors and arrays, by type, shape and bytes; data sets, by the pixels of their ``pictures``; mappings
            and sequences of such; iterators of bytes as these come; anything else by its ``repr``.
    """
    digest = hashlib.sha256()
    for part in parts:
        for piece in _pieces(part):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(part: Any) -> Iterable[bytes]:
    """What a part is made of; each level says how long it is, so that no two parts run into one another."""
    if isinstance(part, Tensor):
        yield f"{part.dtype} {tuple(part.shape)}".encode()
        yield part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(part, np.ndarray):  # as a tensor, which a file that is mapped for reading alone would not become
        yield f"torch.{part.dtype} {part.shape}".encode()
        yield part.tobytes()
    elif isinstance(part, Mapping):
        yield f"{len(part)} by name".encode()
        for name, value in part.items():
            yield repr(name).encode()
            yield from _pieces(value)
    elif hasattr(part, "pictures"):
        yield f"{len(part)} pictures".encode()
        for rows in torch.split(torch.arange(len(part)), 256 if getattr(part, "kinds", None) is None else 1):
            yield part.pictures(rows).numpy().tobytes()
    elif isinstance(part, Iterator):
        yield from part
    elif isinstance(part, Sequence) and not isinstance(part, str | bytes):
        yield f"{len(part)} in order".encode()
        for value in part:
            yield from _pieces(value)
    else:
        yield repr(part).encode()


def checksum(tensors: Iterable[Tensor]) -> str:
    """A short name of values on a device: two sums over the bits of each tensor, one weighted by place.

    Integers are added, so the same values give the same name on every device. One look at the weights costs a fraction
    of a training step; it tells whether weights have changed, and is no protection against intent.
    """
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        bits = bits.view(torch.int32) if len(bits) % 4 == 0 else bits
        places = torch.arange(1, len(bits) + 1, device=bits.device)
        sums += [bits.sum(dtype=torch.int64), (bits * places).sum()]
    return fingerprint(torch.stack([s.to(sums[0].device) for s in sums])) if sums else ""
