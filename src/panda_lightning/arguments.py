"""Arguments are checked by their annotations: type, choices and bounds, whoever sets them and whenever."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from os import PathLike
from types import FrameType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from panda_lightning.runtime.derived import Derived
from panda_lightning.types import PandaError


@dataclass(frozen=True)
class Bounds:
    """What a number may be, in an annotation: ``Annotated[int, Bounds(1)]``.

    Attributes:
        least: The least value, or with ``above`` what it must exceed.
        most: The largest value, or with ``below`` what it must stay under.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def hold(self, value: Any) -> bool:
        """Whether a number lies within."""
        low = self.least < value if self.above else self.least <= value
        high = value < self.most if self.below else value <= self.most
        return bool(low and high)

    def __str__(self) -> str:
        least, most = (str(int(v)) if float(v).is_integer() else str(v) for v in (self.least, self.most))
        low = f"a number above {least}" if self.above else least
        if self.most == math.inf:
            return low if self.above else f"{low} or more"
        if self.below:
            return f"{low}{'' if self.above else ' or more'} and below {most}"
        return f"{low}{',' if self.above else ''} {'up ' if self.above else ''}to {most}"


@dataclass(frozen=True)
class Form:
    """What a text may be, in an annotation: what ``parse`` reads without a ValueError."""

    parse: Callable[[str], Any]
    words: str

    def hold(self, value: Any) -> bool:
        """Whether a text can be read."""
        try:
            self.parse(str(value))
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        return self.words


Count = Annotated[int, Bounds(1)]
Number = Annotated[int, Bounds(0)]  # of things that may be none
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # as NumPy and Lightning have it
Amount = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, above=True)]
Fraction = Annotated[float, Bounds(0, 1, below=True)]
Share = Annotated[float, Bounds(0, 1, above=True)]
OpenShare = Annotated[float, Bounds(0, 1, above=True, below=True)]


class Checked:
    """A class whose arguments have the values that their annotations allow, in the constructor and ever after.

    An attribute of an argument's name is checked like the argument, unless the class gives it a type of its own.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        cls: Any = type(self)
        if name in _hints(cls) and not _has_own_type(cls, name):
            require(name, value, _hints(cls)[name])
        super().__setattr__(name, value)

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **kwargs: Any) -> None:
        """Collect the arguments as Lightning does, and check also those whose attributes have other names."""
        frame = frame or sys._getframe(1)
        super().save_hyperparameters(*args, frame=frame, **kwargs)  # type: ignore[misc]
        hints = _hints(cast(Any, type(self)))
        for name, value in cast(Any, self).hparams.items():
            if name in hints:
                require(name, value, hints[name])


def require(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that an annotation does not allow.

    Args:
        name: What it is called.
        value: It.
        hint: A type; None, Literal, Union, tuple and Annotated with Bounds are understood.

    Raises:
        PandaError: Saying what is allowed.
    """
    if not _allowed(value, hint):
        raise PandaError(f"{name}={value} is not allowed: choose {_words(hint)}.")


def _allowed(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _allowed(value, parts[0]) and all(
            part.hold(value) for part in parts[1:] if isinstance(part, Bounds | Form)
        )
    if kind in (Union, UnionType):
        return any(_allowed(value, part) for part in parts)
    if kind is Literal:
        return any(value is part or (type(value) is type(part) and value == part) for part in parts)
    if kind is tuple:
        if not isinstance(value, list | tuple) or not value or (parts[-1] is not ... and len(value) != len(parts)):
            return False
        return all(_allowed(v, parts[0]) for v in value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str | PathLike)
    return not isinstance(kind or hint, type) or isinstance(value, kind or hint)


def _words(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        bounds = ", ".join(str(part) for part in parts[1:] if isinstance(part, Bounds | Form))
        return f"{'a whole number, ' if parts[0] is int else ''}{bounds}" if bounds else _words(parts[0])
    if kind in (Union, UnionType):
        return ", or ".join(_words(part) for part in parts)
    if kind is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if kind is tuple:
        count = "one or more" if parts[-1] is ... else len(parts)
        return f"{count} values, each {_words(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null (None)"}
    return names.get(hint, getattr(kind or hint, "__name__", str(hint)))


@cache
def _hints(cls: Any) -> Mapping[str, Any]:
    """The annotations of a class's arguments, with those that its constructor hands on to base classes."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and base is not object and issubclass(base, Checked):
            found |= get_type_hints(base.__init__, include_extras=True)
    return {name: hint for name, hint in found.items() if name not in ("return", "kwargs")}


@cache
def _has_own_type(cls: Any, name: str) -> bool:
    annotated = any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__)
    return annotated or isinstance(getattr(cls, name, None), Derived)


def subclasses(base: type[Any]) -> list[type[Any]]:
    """Every class below this one that has been imported."""
    direct: list[type[Any]] = base.__subclasses__()
    return [*direct, *(sub for cls in direct for sub in subclasses(cls))]
