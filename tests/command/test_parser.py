"""Help: in words, and whole, for each class."""

import inspect
import re

import pytest

from panda_lightning import DN2, PANDA
from panda_lightning.arguments import subclasses
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.detectors import Detector
from panda_lightning.tools import TOOLS, main

CLASSES = [
    (flag, cls.__name__)
    for flag, base in (("model", Detector), ("data", AnomalyDataModule))
    for cls in subclasses(base)
    if cls.__module__.startswith("panda_lightning") and not inspect.isabstract(cls)
]
INSIDE = re.compile(r"Annotated|Bounds\(|Form\(|Literal\[|Optional\[|Union\[|<class '|[Ss]ee [A-Z]\w+[.:;,] ")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def helped(capsys, call, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*words)
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_arguments_are_explained_where_they_are_listed(run, capsys, kind, name):
    text = helped(capsys, run, "fit", f"--{kind}.help={name}")
    assert text.startswith(f"Help for --{kind}.help=panda_lightning.{name} ")  # without two pages of usage
    assert not INSIDE.search(text)


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_are_explained_in_words(capsys, tool):
    assert not INSIDE.search(helped(capsys, main, [tool, "--help"]))


def test_types_and_what_other_classes_say(run, capsys):
    text = helped(capsys, run, "fit", "--model.help=PANDA")
    assert "--model.k K Neighbours to sum over. (type: int (1 or more), default: 2)" in text
    assert "--model.normalize {true,false} L2-normalise features for scoring. (default: False)" in text
    assert "(type: float (a number above 0) | null, default: 0.001)" in text
    assert "(type: token, avg, both | null, default: null)" in text
    for cls, name in ((DN2, "backbone"), (PANDA, "prefix_cache_dir")):
        (own,) = re.findall(rf" {name}: (.*?)\n\s+\w+: ", cls.__doc__, re.DOTALL)
        assert " ".join(own.split()) in helped(capsys, run, "fit", "--model.help=MSC")
    text = helped(capsys, run, "fit", "--model.help=PatchCore")
    assert "or a checkpoint file of this project; a checkpoint of PANDA gives its adapted network. (type: str" in text


class Pointing(DN2):
    """A user's own.

    Args:
        first: See https://nowhere.example/first.
        second: See Nothing; but not here.
        third: See DN2.
        fourth: See Pointing.
        backbone: See DN2; the second of two.
    """

    def __init__(self, first: int = 1, second: int = 2, third: int = 3, fourth: int = 4, backbone: str = "panda_tiny"):
        super().__init__(backbone)


def test_what_points_nowhere_stays_as_it_is(run, capsys):
    text = helped(capsys, run, "fit", f"--model.help={__name__}.Pointing")
    for kept in ("See https://nowhere.example/first. (type", "See Nothing; but not here. (type", "See DN2. (type"):
        assert kept in text
    assert "See Pointing. (type" in text
    assert "or a checkpoint file of this project; the second of two. (type" in text
