import os
import pickle

import pytest
import torch

from panda_lightning import PandaError
from panda_lightning.runtime.agreement import differences, made_with, newest_alike, require_same
from panda_lightning.runtime.checkpoints import FORMAT

MODEL = {"_class_path": "panda_lightning.detectors.panda.PANDA", "k": 2, "lr": 0.1, "centroids": None}
DATA = {"_class_path": "panda_lightning.datamodules.digits.Digits", "normal_class": "3", "root": "here"}


def checkpoint(path, model=MODEL, data=DATA, time=0, **derived):
    """What a run leaves, as far as it says what was given."""
    kept = {"state_dict": {"_extra_state": {"format": FORMAT, "derived": {"bank": torch.ones(2), **derived}}}}
    given = {"hyper_parameters": model, "datamodule_hyper_parameters": data}
    kept |= {key: arguments for key, arguments in given.items() if arguments is not None}
    torch.save(kept, path)
    os.utime(path, (time, time))
    return path


def asked(model=None, data=None, **arguments):
    """A configuration of the command line: class paths, and arguments by their part."""
    config = {"model": {"class_path": model}, "data": {"class_path": data}}
    for name, value in arguments.items():
        part = "data" if name in ("normal_class", "root") else "model"
        config[part].setdefault("init_args", {})[name] = value
    return config


def test_a_checkpoint_says_what_it_was_made_with(tmp_path):
    state, made = made_with(checkpoint(tmp_path / "a.ckpt"))
    assert state["derived"]["bank"].tolist() == [1, 1]
    assert made == {"model": MODEL, "data": DATA, "run": {"seed": None}}


def test_the_data_of_a_checkpoint_made_in_python_are_those_it_was_derived_from(tmp_path):
    path, origin = tmp_path / "a.ckpt", {"data": "Digits"}
    assert made_with(checkpoint(path, data={"seed": 1}, origin=origin))[1]["data"] == {
        "seed": 1, "_class_path": "Digits"
    }  # fmt: skip
    assert made_with(checkpoint(path, data=None, origin=origin))[1]["data"] == {"_class_path": "Digits"}
    assert made_with(checkpoint(path, origin={"data": "CIFAR10"}))[1]["data"] == DATA  # what the command line wrote
    for nothing in ({}, {"origin": None}):
        made = made_with(checkpoint(path, model=None, data=None, **nothing))[1]
        assert made["model"] == {}
        assert not any(made["data"].values())


class Harm:
    """What a stranger's checkpoint may hold: loading it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", harm=Harm(str(tmp_path / "harm")))
    with pytest.raises((pickle.UnpicklingError, PandaError)):
        made_with(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


FREE = {"model": ("lr",), "data": ("root",)}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (asked("PANDA", "Digits", k=2, normal_class="3"), []),
        (asked("other.place.PANDA", "Digits"), []),  # the class's own name counts
        (asked(k=3), ["model.k 3, not 2"]),
        (asked("PANDA", "Digits", k=3, normal_class="5"), ["model.k 3, not 2", "data.normal_class 5, not 3"]),
        (asked("panda_lightning.DN2", "Digits", k=3, root="x"), ["model DN2, not PANDA"]),  # whose k is another thing
        (asked("DN2", "CIFAR10", k=3), ["model DN2, not PANDA", "data CIFAR10, not Digits"]),
        (asked(lr=5, root="there"), []),  # these are free
        (asked(depth=5), []),  # nor does the checkpoint know this one
        (asked(centroids=4), ["model.centroids 4, not None"]),
        (asked(centroids="None"), ["model.centroids None, not None"]),  # a text
        ({"model": asked(k=3)["model"]}, ["model.k 3, not 2"]),  # nothing is asked of the data
        ({"data": asked(normal_class="5")["data"]}, ["data.normal_class 5, not 3"]),
        ({"model": {"init_args": None}, "data": None}, []),
    ],
)
def test_settings_that_differ_are_named(config, found):
    assert differences(config, {"model": MODEL, "data": DATA}, FREE) == found


def test_only_the_parts_to_compare_are_compared():
    config, made = asked("DN2", "CIFAR10"), {"model": MODEL, "data": DATA}
    assert differences(config, made, {"data": ()}) == ["data CIFAR10, not Digits"]
    assert differences(config, made, {}) == []
    assert differences(asked("DN2", k=2), {"model": {"k": 2}, "data": {}}, FREE) == []  # it does not say its class


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (2, 2, True), (2, 2.0, True), (2, "2", True), (2, 3, False), ("spot", "stripe", False), (None, None, True),
        (None, "None", False), (0, None, False), ([1, 2], (1, 2), True), ([1, "2"], (1.0, 2), True),
        ([1, 2], [1, 3], False), ([1, 2], [1, 2, 3], False), ([1, 2, 3], [1, 2], False), ([], [], True),
        ([[1, 2], [3]], [(1, "2"), [3]], True), ([[1, 2], [3]], [[1, 2], [4]], False), ([1], 1, False), (1, [1], False),
        (torch.float16, "torch.float16", True),
    ],
)  # fmt: skip
def test_settings_mean_the_same_however_they_are_written(one, other, same):
    config, made = asked(k=one), {"model": {"k": other}, "data": {}}
    assert differences(config, made, FREE) == ([] if same else [f"model.k {one}, not {other}"])


def test_the_newest_of_this_very_configuration_is_found(tmp_path, caplog):
    folders, path = [tmp_path / "0", tmp_path / "1"], tmp_path / "1/b.ckpt"
    for folder in folders:
        folder.mkdir()
    checkpoint(tmp_path / "0/a.ckpt", time=1)
    checkpoint(path, time=2)
    checkpoint(tmp_path / "0/c.ckpt", {**MODEL, "k": 5}, {**DATA, "normal_class": "7"}, time=3)
    checkpoint(tmp_path / "1/d.ckpt", data={**DATA, "root": "there"}, time=4)
    config = asked("PANDA", "Digits", k=2, lr=9, normal_class="3", root="here")
    caplog.set_level("INFO")
    assert newest_alike(config, FREE, folders) == str(path)
    assert caplog.messages[-1] == f"ckpt_path=last: {path}"
    none = "ckpt_path=last: there is no checkpoint of this configuration yet"
    assert newest_alike(config, {"model": (), "data": ()}, folders) is None  # lr counts now
    other = "d.ckpt has other settings: model.lr 9, not 0.1; data.root here, not there"
    assert caplog.messages[-1] == f"{none} ({tmp_path}/1/{other})"  # though root changes no result
    assert newest_alike(config, FREE, [tmp_path]) is None
    assert caplog.messages[-1] == none


def test_where_no_part_is_to_be_compared_any_checkpoint_is_alike(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert newest_alike(asked("Theirs"), {}, [tmp_path]) == str(tmp_path / "foreign.ckpt")


BEFORE = {
    "data": "Digits", "problem": {"normal_class": "3"}, "view": {"image_size": 32, "crop": "squash"}, "seed": 0,
    "normal training images": "20 (a)", "files": "b", "settings": {"k": 2, "centroids": None}, "precision": "32-true",
}  # fmt: skip
VIEW = {"view": {"image_size": 64, "crop": "center"}}
PROBLEM, SETTINGS = {"problem": {"normal_class": "5"}}, {"settings": {"k": 3, "centroids": None}}
IMAGES = {"normal training images": "9 (c)", "seed": 1, "precision": "64-true", "files": "d"}
OTHER_DATA = {"data": "Folder", "problem": {"normal_class": "spot"}}


@pytest.mark.parametrize(
    ("training", "learns", "now", "sentence"),
    [
        (True, True, {"files": "d"}, None),  # a copy of the images
        (True, True, {"seed": "0", "settings": {"k": 2.0, "centroids": None, "new": 1}}, None),
        (True, True, IMAGES, "seed=1, not 0; normal training images=9 (c), not 20 (a); precision=64-true, not 32-true"),
        (True, True, OTHER_DATA, "data=Folder, not Digits; normal_class=spot, not 3"),
        (True, True, VIEW, "image_size=64, not 32; crop=center, not squash"),
        (True, True, SETTINGS, "k=3, not 2"),
        (True, True, {"settings": {}}, "k=None, not 2"),
        (True, False, SETTINGS, "k=3, not 2"),
        (False, True, IMAGES, None),
        (False, True, OTHER_DATA, None),
        (False, True, SETTINGS, None),  # they say how training went
        (False, False, SETTINGS, "k=3, not 2"),  # they say how the bank is made
        (False, True, PROBLEM, "normal_class=5, not 3"),
        (False, True, OTHER_DATA | VIEW, "image_size=64, not 32; crop=center, not squash"),
        (False, False, VIEW | PROBLEM | SETTINGS,
         "image_size=64, not 32; crop=center, not squash; normal_class=5, not 3; k=3, not 2"),
    ],
)  # fmt: skip
def test_data_and_arguments_that_do_not_suit_are_refused(training, learns, now, sentence):
    if sentence is None:
        require_same("PANDA", BEFORE, BEFORE | now, training, learns)
        return
    advice = (
        "to resume, use the old ones; to train with these, start a new run"
        if training
        else "use the old ones, or train again"
    )
    with pytest.raises(PandaError) as refusal:
        require_same("PANDA", BEFORE, BEFORE | now, training, learns)
    assert str(refusal.value) == (f"PANDA was made with data or arguments other than these ({sentence}): {advice}.")
