"""State that a run derives from weights and images, and short names for what it was derived from."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")
S = TypeVar("S")


class Derived(Generic[T]):
    """An attribute of a detector that a run derives: a bank, a centre, the number of steps trained.

    All of them live in the detector's dictionary ``derived``, which goes into checkpoints and comes back from other
    processes as one piece, and is emptied as one piece. So no attribute can be saved without the others, or outlive
    what it was made from. Values are tensors and primitives, possibly nested; they are replaced, not changed in place.

    Args:
        before: Its value before any run; immutable.
    """

    def __init__(self, before: T) -> None:
        self.before = before

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, detector: None, owner: type) -> "Derived[T]": ...

    @overload
    def __get__(self, detector: Any, owner: type) -> T: ...

    def __get__(self, detector: Any, owner: type) -> "Derived[T] | T":
        if detector is None:
            return self
        value: T = detector.derived.get(self.name, self.before)
        return value

    def __set__(self, detector: Any, value: T) -> None:
        detector.derived[self.name] = value


def mapped(value: S, change: Callable[[Tensor], Tensor]) -> S:
    """A nested value with every tensor changed."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif isinstance(value, Mapping):
        found = {key: mapped(part, change) for key, part in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(mapped(part, change) for part in value)
    result: S = found
    return result


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits made of all that is given.

    Args:
        parts: Tensors, by type, shape and bytes; data sets, by the pixels of their ``pictures``; mappings and sequences
            of such; anything else by its ``repr``.
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
    elif isinstance(part, Mapping):
        yield f"{len(part)} by name".encode()
        for name, value in part.items():
            yield repr(name).encode()
            yield from _pieces(value)
    elif hasattr(part, "pictures"):
        yield f"{len(part)} pictures".encode()
        for rows in torch.split(torch.arange(len(part)), 256):
            yield part.pictures(rows).numpy().tobytes()
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
