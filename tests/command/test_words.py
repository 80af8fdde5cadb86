import sys
from pathlib import Path

import pytest
from jsonargparse import Namespace

from panda_lightning.command.words import at_home, find_own_classes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("~", "HOME"),
        ("~/x y", "HOME/x y"),
        ("local-dir:~/w", "local-dir:HOME/w"),
        ("CIFAR100:~", "CIFAR100:HOME"),
        *((same, same) for same in ("a~/b", "~other/x", "C:~x", "x/~/y", "~~/x", "", None, 3, True, 0.5)),
        (Path("~/x"), Path("HOME/x")),
        (Path("x~"), Path("x~")),
        (["~/x", ("~/y", 1)], ["HOME/x", ("HOME/y", 1)]),
        ({"~": "~/x"}, {"~": "HOME/x"}),
        (Namespace(a=Namespace(b=["~/x"]), c={"d": "~/y"}), Namespace(a=Namespace(b=["HOME/x"]), c={"d": "HOME/y"})),
    ],
    ids=str,
)
def test_the_home_folder_is_put_for_a_tilde(value, expected, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, "HOME")
    assert at_home(value) == expected


def test_the_current_folder_is_looked_in_last_and_once(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/somewhere"])
    for _ in range(2):
        find_own_classes()
    assert sys.path == ["/somewhere", ""]
