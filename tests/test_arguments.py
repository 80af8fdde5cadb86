import math
from inspect import Parameter, isabstract, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import yaml

from panda_lightning import PANDA, SPADE, Digits, Pretraining, SaveOnSignal
from panda_lightning.arguments import Bounds, Checked, Form, _hints, require, subclasses
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.detectors import Detector
from panda_lightning.types import PandaError

ROOT = Path(__file__).parents[1]
CLASSES = [c for c in subclasses(Checked) if not isabstract(c) and c.__module__.startswith("panda_lightning.")]


def accepted(cls: type) -> list[str]:
    """The arguments of a class, with those that it hands on to base classes."""
    for base in cls.__mro__:
        parameters = signature(base.__init__).parameters if "__init__" in vars(base) else {}
        if parameters and not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
            return [*parameters, *(n for b in cls.__mro__[: cls.__mro__.index(base)] for n in _hints(b))]
    return []


ARGUMENTS = [(cls, name, hint) for cls in CLASSES for name, hint in _hints(cls).items() if name in accepted(cls)]
ANY_NUMBER = {"normal_class"}  # the data set knows its classes


def pieces(hint: Any) -> list[Any]:
    """The annotation and all that it is made of."""
    inner = [] if get_origin(hint) is Literal else [part for arg in get_args(hint) for part in pieces(arg)]
    return [hint, *inner]


def bounds(hint: Any) -> list[tuple[type, Bounds]]:
    """Each number of an annotation: its type and bounds."""
    found = [get_args(p)[:2] for p in pieces(hint) if get_origin(p) is Annotated]
    return [(kind, bound) for kind, bound in found if isinstance(bound, Bounds)]


def outside(hint: Any) -> list[Any]:
    """Values just outside of an annotation."""
    found: list[Any] = [object()]
    if None not in [p if p is not type(None) else None for p in pieces(hint)]:
        found.append(None)
    if str not in pieces(hint):
        found += ["no such choice"] if Literal in map(get_origin, pieces(hint)) else ["1"]
    if any(isinstance(part, Form) for part in pieces(hint)):
        found += ["", "bits", "bits:7", "bits:33", "bits:1e1", "window:5", "window:9,1", "window:1,nan", "automatic"]
    for kind, bound in bounds(hint):
        step = 1 if kind is int else 1e-9
        low = kind(bound.least) if bound.above else kind(bound.least - step)
        found += [low, True, *([math.nan, math.inf, -math.inf] if kind is float else [1.5])]
        if bound.most < math.inf:
            found.append(kind(bound.most) if bound.below else kind(bound.most + step))
    if get_origin(hint) is tuple:
        found = [(), *((value,) for value in found), 3]
    return found


@pytest.mark.parametrize(("cls", "name", "hint"), ARGUMENTS, ids=[f"{c.__name__}.{n}" for c, n, _ in ARGUMENTS])
def test_values_just_outside_are_refused_in_one_sentence(cls: type, name: str, hint: Any):
    needed = {
        n: "x" for n, p in signature(cls).parameters.items() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    }
    for value in outside(hint):
        with pytest.raises(PandaError, match=rf"^{name}=[^\n]* is not allowed: choose [^\n]*\.$"):
            cls(**needed | {name: value})


def test_all_classes_with_arguments_are_walked_and_every_number_has_bounds():
    assert len(CLASSES) >= 20
    for cls, name, hint in ARGUMENTS:
        plain = [p for p in pieces(hint) if p in (int, float)]
        assert len(plain) == len(bounds(hint)) or name in ANY_NUMBER, f"{cls.__name__}.{name}"


def test_an_attribute_is_checked_like_the_argument():
    data, detector = Digits(), SPADE("panda_tiny")
    for owner, name, value in (
        (data, "batch_size", 0),
        (data, "crop", "middle"),
        (detector, "k", -1),
        (detector, "sigma", -0.1),
    ):
        before = getattr(owner, name)
        with pytest.raises(PandaError, match=f"{name}={value} is not allowed"):
            setattr(owner, name, value)
        assert getattr(owner, name) == before
    data.batch_size, detector.k = 7, np.int64(3)
    assert (data.batch_size, detector.k) == (7, 3)


def test_a_users_subclass_is_checked_too():
    class Own(PANDA):
        def __init__(self, share: Annotated[float, Bounds(0, 0.5)] = 0.1, **kwargs: Any):
            super().__init__(**kwargs)
            self.share = share

    assert Own(share=0.5).share == 0.5
    with pytest.raises(PandaError, match=r"share=0.6 is not allowed: choose 0 to 0.5\."):
        Own(share=0.6)
    with pytest.raises(PandaError, match="k=0"):
        Own(k=0)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (0, Annotated[int, Bounds(1)], "a whole number, 1 or more"),
        (0.0, Annotated[float, Bounds(0, above=True)], "a number above 0"),
        (1.0, Annotated[float, Bounds(0, 1, below=True)], "0 or more and below 1"),
        (1.5, Annotated[float, Bounds(0, 1, above=True)], "a number above 0, up to 1"),
        (1.0, Annotated[float, Bounds(0, 1, above=True, below=True)], "a number above 0 and below 1"),
        (2.0, Annotated[float, Bounds(0, 1)], "0 to 1"),
        ("x", Annotated[int, Bounds(1)] | None, "a whole number, 1 or more, or null (None)"),
        ("x", Literal["a", "b"] | None, "one of a, b, or null (None)"),
        (1, bool, "true or false"),
        (1, str, "a text"),
        (1, dict[str, Any] | None, "dict, or null (None)"),
    ],
)
def test_the_sentence_says_what_is_allowed(value: Any, hint: Any, words: str):
    with pytest.raises(PandaError) as refused:
        require("x", value, hint)
    assert str(refused.value) == f"x={value} is not allowed: choose {words}."


def test_defaults_and_the_values_of_every_config_are_allowed():
    by_name = {cls.__name__: cls for cls in CLASSES}
    assert PANDA("panda_tiny").k == 2
    checked = 0
    for path in (ROOT / "conf").rglob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        for part in ("model", "data"):
            section = config.get(part) or {}
            cls = by_name.get(str(section.get("class_path")).split(".")[-1]) if isinstance(section, dict) else None
            for name, value in (section.get("init_args") or {}).items() if cls else ():
                require(name, value, _hints(cls)[name])
                checked += 1
    assert checked > 20


def test_callbacks_are_checked():
    assert SaveOnSignal(every_n_steps=None).every_n_steps is None
    with pytest.raises(PandaError, match="every_n_steps=0"):
        SaveOnSignal(every_n_steps=0)
    with pytest.raises(PandaError, match="momentum=1"):
        Pretraining(momentum=1.0)


def test_no_detector_has_an_argument_of_a_data_set():
    """Lightning writes both into one table of hyper-parameters, and refuses two values under one name."""
    detectors = {name for cls in subclasses(Detector) for name in signature(cls).parameters}
    data = {name for cls in subclasses(AnomalyDataModule) for name in signature(cls).parameters}
    assert detectors & data <= {"kwargs", "args"}
