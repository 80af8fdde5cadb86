"""What cannot be meant ends in one sentence and an exit status that is not 0, before any work.

test_arguments.py has the values of all arguments of all classes.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from panda_lightning import DN2, OCSVM, PANDA, Digits, PandaError, PatchCore
from panda_lightning.tools import main as panda
from tests.conftest import fast
from tests.detectors.test_panda import trainer
from tests.test_cli import refusal


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return (os.mkdir, ("was-run",))


@pytest.fixture
def files(workdir, folder):
    """The current folder, with files of all wrong kinds, and images."""
    (workdir / "text").write_text("text")
    (workdir / "binary.yaml").write_bytes(bytes(range(128, 256)))
    (workdir / "empty.yaml").write_text("")
    (workdir / "list.yaml").write_text("- 1\n")
    (workdir / "broken.yaml").write_text("model: [\n")
    (workdir / "k.yaml").write_text("model:\n  class_path: PANDA\n  init_args: {k: 2}\n")
    (workdir / "garbage.ckpt").write_bytes(b"garbage" * 99)
    (workdir / "nothing.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}, "more": Code()}, workdir / "code.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, workdir / "foreign.ckpt")
    torch.save([1], workdir / "list.ckpt")
    torch.save({"weight": torch.zeros(1)}, workdir / "plain.pth")
    return workdir


TRAINER = "these Trainer arguments do not work here: "
FIT = [
    ("--trainer.devices=0", TRAINER),
    ("--trainer.devices=-3", TRAINER),
    ("--trainer.accelerator=tpu", TRAINER),
    ("--trainer.accelerator=foo", TRAINER),
    ("--trainer.strategy=foo", TRAINER),
    ("--trainer.max_epochs=-5", TRAINER),
    ("--trainer.max_steps=-5", TRAINER),
    ("--trainer.max_time=foo", TRAINER),
    ("--trainer.limit_val_batches=-1", TRAINER),
    ("--trainer.limit_train_batches=1.5", TRAINER),
    ("--trainer.val_check_interval=-1.5", TRAINER),
    ("--trainer.num_nodes=0", TRAINER),
    ("--trainer.precision=7", "trainer.precision"),
    ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches=0 is not allowed: choose a whole number, 1 or"),
    ("--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch=0 is not allowed"),
    ("--trainer.callbacks=Foo", "trainer.callbacks"),
    ("--trainer.logger=Foo", "trainer.logger"),
    ("--trainer.foo=1", "foo"),
    ("--foo=1", "foo"),
    ("--seed_everything=4294967296", "seed_everything=4294967296 is not allowed: .* 0 to 4294967295"),
    ("--seed_everything=-1", "seed_everything=-1 is not allowed"),
    ("--seed_everything=foo", "seed_everything"),
    ("--config=binary.yaml", "not text"),
    ("--config=empty.yaml", "Unexpected config"),
    ("--config=list.yaml", "Unexpected config"),
    ("--config=broken.yaml", "config"),
    ("--config=nowhere.yaml", "does not exist"),
    ("--config=images", "not a file"),
    ("--model.k=3 --config=k.yaml", "--model.init_args.k 3 is overridden by a later --config: put flags after"),
    ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt is not a file"),
    ("--ckpt_path=images", "images is not a file"),
    ("--ckpt_path=garbage.ckpt", "garbage.ckpt is broken"),
    ("--ckpt_path=nothing.ckpt", "nothing.ckpt is broken"),
    (
        "--ckpt_path=code.ckpt",
        "code.ckpt is refused, because it may contain only tensors and primitives .it asks to run",
    ),
    ("--ckpt_path=foreign.ckpt", "no format number: it is not from this project"),
    ("--ckpt_path=list.ckpt", "no format number: it is not from this project"),
    ("--ckpt_path=hpc", "no HPC checkpoint was found"),
    ("--model.prefix_cache_dir=text", "prefix_cache_dir=text cannot be written to"),
    ("--trainer.logger.save_dir=text", "save_dir=text.* cannot be written to"),
    ("--data.root=text", "there are no images in text"),
    ("--data.image_size=100000", "image_size=100000 is not allowed: choose a whole number, 1 to 16384"),
    ("--data.image_size=-5", "image_size=-5 is not allowed"),
    ("--data.batch_size=0", "batch_size=0 is not allowed"),
    ("--data.num_workers=-1", "num_workers=-1 is not allowed"),
    ("--data.memory_gb=-1", "memory_gb=-1.0 is not allowed"),
    ("--data.normal_class=7", "normal_class=7 is not a class"),
    ("--data.foo=1", "foo"),
    ("--data=PANDA", "data"),
    ("--model=CIFAR10", "model"),
    ("--model.lr=.nan", "lr=nan is not allowed: choose 0 or more"),
    ("--model.lr=-1", "lr=-1.0 is not allowed"),
    ("--model.momentum=2", "momentum=2.0 is not allowed: choose 0 or more and below 1"),
    ("--model.grad_clip=-1", "grad_clip=-1.0 is not allowed: choose a number above 0, or null"),
    ("--model.k=null", "k=None is not allowed"),
    ("--model.k=1.5", "expected int"),
    ("--model.adapt_stages=9", "adapt_stages=9 does not fit"),
    ("--model.optimize=fast", "expected one of"),
    ("--model.backbone=code.ckpt", "code.ckpt is refused"),
    ("--model.backbone=garbage.ckpt", "garbage.ckpt is refused"),
    ("--model.backbone=foreign.ckpt", "no format number"),
    ("--model.backbone=local-dir:images", "cannot be loaded"),
    ("--model.backbone=resnet10t --model.weights=code.ckpt", "cannot be loaded .the file contains more than tensors"),
    ("--model.backbone=resnet10t --model.weights=images", "weights=images is not a file"),
    ("--model.fisher=images", "fisher=images is neither a file"),
    ("--model.fisher=code.ckpt", "code.ckpt is refused"),
    ("--model.fisher=garbage.ckpt", "garbage.ckpt is refused"),
    ("--model.fisher=plain.pth", "plain.pth does not fit"),
    ("--model.fisher=list.ckpt", "is not a dictionary of tensors"),
    ("--model=PANDAOE", "outlier exposure needs images"),
    ("--model=PANDAOE --data.outliers=nowhere", "outliers=nowhere is neither a folder"),
    ("--data.outliers=images/test", "would be ignored"),
]


@pytest.mark.parametrize(("words", "sentence"), FIT, ids=[words for words, _ in FIT])
def test_what_cannot_be_meant_ends_in_a_sentence(files, run, capsys, words, sentence):
    said = refusal(run, capsys, "fit", *fast(files / "images", epochs=1), *words.split())
    assert re.search(sentence, said), said
    assert not list(files.glob("runs/t/version_*/checkpoints/*"))
    assert not (files / "was-run").exists()


@pytest.mark.parametrize("words", ["fit", "fit --model=PANDA", "fit --data=Digits", "train", "--foo"])
@pytest.mark.usefixtures("files")
def test_a_command_without_its_parts_says_which(run, capsys, words):
    assert re.search("required|invalid choice|unrecognized|expected", refusal(run, capsys, *words.split()))


def test_the_version_is_told(run, capsys):
    for call in (lambda: run("--version"), lambda: panda(["--version"])):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 0
        assert re.search(r"\d+\.\d+.*panda-lightning", capsys.readouterr().out)


def test_a_flag_for_one_of_several_loggers_is_refused(files, run, capsys):
    (files / "two.yaml").write_text(
        "trainer:\n  logger:\n  - {class_path: CSVLogger, init_args: {save_dir: a}}\n"
        "  - {class_path: CSVLogger, init_args: {save_dir: b}}\n"
    )
    words = [word for word in fast(files / "images") if "trainer.logger" not in word]
    said = refusal(run, capsys, "fit", "--config=two.yaml", *words, "--trainer.logger.name=mine")
    assert "--trainer.logger.name would be set only for the last of 2 loggers: name the one logger" in said


def test_too_little_memory_is_said(files, run, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 30000000000 bytes.")

    monkeypatch.setattr("panda_lightning.datamodules.base.decoded", full)
    said = refusal(run, capsys, "fit", *fast(files / "images"))
    assert re.search(r"out of memory .*lower data.batch_size, data.eval_batch_size", said)


@pytest.mark.pictures
def test_a_full_disk_leaves_no_empty_picture(files, run, capsys, monkeypatch):
    def full(figure, path, **_):
        Path(path).write_bytes(b"")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    said = refusal(run, capsys, "fit", *fast(files / "images", epochs=1), "--model.ewc_weight=0")
    assert "No space left on device" in said
    assert "resume with --ckpt_path last" in said
    assert not list(files.glob("runs/t/version_*/*.png"))
    assert not list(files.glob("runs/t/version_*/.panda*"))


FISHER = [
    ("--samples=0", "--samples=0 is not allowed: choose a whole number, 1 or more"),
    ("--samples=-1", "--samples=-1 is not allowed"),
    ("--batch=1", "--batch=1 is not allowed: choose a whole number, 2 or more"),
    ("--batch=99", "--batch 99 needs 99 or more images"),
    ("--batch=4 --per-sample", "two estimators: choose one"),
    ("--image_size=0", "--image_size=0 is not allowed"),
    ("--memory_mb=0", "--memory_mb=0 is not allowed"),
    ("--seed=-1", "--seed=-1 is not allowed"),
    ("--devices=0", "--devices=0 is not allowed"),
    ("--adapt_stages=0", "--adapt_stages=0 is not allowed"),
    ("--adapt_stages=9", "adapt_stages=9 does not fit"),
    ("--data=nowhere", "nowhere has no images"),
    ("--labels=foo", "expected one of"),
    ("--labels=true", "do not have the name of a class"),
    ("--output=images", "images is a folder: name a file"),
    ("--output=text/f.safetensors", "cannot be written to"),
    ("--backbone=code.ckpt", "code.ckpt is refused"),
    ("--backbone=resnet19x", "cannot be loaded"),
    ("--weights=nowhere", "weights=nowhere is not a file"),
    ("--foo=1", "foo"),
]


@pytest.mark.parametrize(("words", "sentence"), FISHER, ids=[words for words, _ in FISHER])
def test_panda_fisher_refuses_before_it_works(files, capsys, words, sentence):
    given = ["fisher", "--backbone=panda_tiny", "--data=images/train", "--output=f.safetensors", *words.split()]
    said = refusal(panda, capsys, given)
    assert re.search(sentence, said), said
    assert not (files / "f.safetensors").exists()


CHECK = [
    ("--config=binary.yaml", "not text"),
    ("--output=images", "images is a folder"),
    ("--output=text/sheet.png", "cannot be written to"),
    ("--data.batch_size=0", "batch_size=0 is not allowed"),
    ("--data.image_size=-1", "image_size=-1 is not allowed"),
    ("--data=PANDA", "data"),
]


@pytest.mark.parametrize(("words", "sentence"), CHECK, ids=[words for words, _ in CHECK])
@pytest.mark.usefixtures("files")
def test_panda_check_data_refuses_before_it_works(capsys, words, sentence):
    said = refusal(panda, capsys, ["check-data", "--data=ImageFolder", "--data.root=images", *words.split()])
    assert re.search(sentence, said), said


def test_mistakes_from_python_are_sentences_too(tmp_path):
    digits = Digits(normal_class="3", image_size=32, train_limit=20, test_limit=40)
    loader = digits.val_dataloader()
    with pytest.raises(PandaError, match=r"needs an AnomalyDataModule, whose normal_dataloader\(\)"):
        trainer(tmp_path, 1).fit(PANDA("panda_tiny"), loader)
    for detector in (DN2("panda_tiny"), PatchCore("panda_tiny"), OCSVM()):
        detector.load_backbone()
        with pytest.raises(PandaError, match="no bank of normal images yet: run a test"):
            detector.anomaly_score(next(iter(loader)))
    with pytest.raises(PandaError, match="check_val_every_n_epoch=0 is not allowed"):
        trainer(tmp_path, 1, check_val_every_n_epoch=0).fit(PANDA("panda_tiny"), digits)
