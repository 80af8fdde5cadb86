"""State that a run derives from weights and images: kept, saved and forgotten as one piece."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

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
