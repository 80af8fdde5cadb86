import re
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

from panda_lightning import Backbone
from panda_lightning.formulas import fisher
from panda_lightning.tools import fisher as tool
from panda_lightning.tools import main
from tests.conftest import picture


@pytest.fixture
def images(tmp_path):
    """Two folders named as classes of panda_tiny's head, 22 and 21 images."""
    names = list(tool.head_classes(Backbone.pretrained("panda_tiny")))[5:7]
    for name, count in zip(names, (22, 21), strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            picture("spot" if name == names[0] else "stripe", i).save(tmp_path / "images" / name / f"{i:02d}.png")
    return tmp_path / "images"


def words(images, output, *more):
    return ["fisher", "--backbone", "panda_tiny", "--data", str(images), "-o", str(output), *more]


def test_true_labels_are_those_of_the_head(images, tmp_path, capsys):
    path = tmp_path / "f.safetensors"
    assert main(words(images, path, "--labels", "true", "--accelerator", "cpu")) == 0
    said = capsys.readouterr().out
    made = fisher.header(path)
    assert made["estimator"] == "true labels"
    assert (made["convention"], made["samples"]) == ("per-sample", "43")
    for key, value in made.items():
        assert re.search(rf"{key}: {re.escape(value)}", said), key
    backbone = Backbone.pretrained("panda_tiny")
    found = fisher.load(str(path), backbone)
    files, labels = tool.find(images, backbone, True, None)
    assert labels.tolist() == [5] * 22 + [6] * 21
    estimator = fisher.Estimator(backbone)
    view = tool.View(64, "center", 73, "bicubic", None)
    pixels = torch.stack([torch.from_numpy(view(file)) for file in files])
    batch = {"image": pixels, "label": torch.from_numpy(labels), "index": torch.arange(43)}
    estimator.add(batch, true_labels=True)
    for name, value in estimator.diagonal().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.max()))


@pytest.mark.parametrize("options", [[], ["--batch", "8"]])
def test_a_killed_run_goes_on_and_gives_the_same(images, tmp_path, monkeypatch, capsys, options):
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    monkeypatch.setattr(tool, "SAVE_EVERY", 8)
    options = [*options, "--accelerator", "cpu"]
    main(words(images, whole, *options))
    original, steps = tool.FisherRun.test_step, []

    def dies(self, batch, batch_idx):
        if batch_idx == 1:
            raise KeyboardInterrupt
        original(self, batch, batch_idx)

    monkeypatch.setattr(tool.FisherRun, "test_step", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(words(images, again, *options))
    assert not again.exists()

    def counts(self, batch, batch_idx):
        steps.append(len(batch["index"]))
        original(self, batch, batch_idx)

    monkeypatch.setattr(tool.FisherRun, "test_step", counts)
    main(words(images, again, *options))
    first = 8 if "--batch" in options else 32
    assert sum(steps) == 43 - first
    assert f"({first} of them from an earlier run)" in capsys.readouterr().out
    a, b = load_file(whole), load_file(again)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-5, atol=1e-7 * float(value.max()))
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"whole.safetensors", "again.safetensors"}


@pytest.mark.slow
def test_two_processes_are_one(images, tmp_path):
    main(words(images, tmp_path / "1.safetensors", "--accelerator", "cpu"))
    command = words(images, tmp_path / "2.safetensors", "--accelerator", "cpu", "--devices", "2")
    done = subprocess.run(
        [sys.executable, "-m", "panda_lightning.tools", *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"{devices}.safetensors") for devices in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--per-sample", "--batch", "4"], "two estimators: choose one"),
        (["--batch", "100"], "needs 100 or more images, but there are 43"),
        (["--data", "nowhere"], "--data nowhere has no images"),
    ],
)
def test_what_cannot_work_is_refused(images, tmp_path, more, says):
    with pytest.raises(SystemExit) as refusal:
        main(words(images, tmp_path / "f.safetensors", *more))
    assert says in str(refusal.value)


def test_folders_that_are_no_classes_are_named(images, tmp_path):
    next(images.iterdir()).rename(images / "zebu")
    with pytest.raises(SystemExit) as refusal:
        main(words(images, tmp_path / "f.safetensors", "--labels", "true"))
    assert "1 folders such as zebu do not have the name of a class of resnet10t" in str(refusal.value)


def test_imagenet_heads_know_synsets_and_names():
    backbone = Backbone(timm.create_model("resnet18"), 2)
    classes = tool.head_classes(backbone)
    assert classes["n01440764"] == classes["tench"] == classes["tinca tinca"] == 0
    assert classes["great white shark"] == 2
    assert classes["n15075141"] == 999
    backbone = Backbone(timm.create_model("resnet18", num_classes=7), 2)
    with pytest.raises(tool.PandaError, match="the 7 classes of resnet18 have no names here"):
        tool.head_classes(backbone)
