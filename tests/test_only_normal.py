"""Normal images alone: no test folder, or none but normal images in it. Detectors train and keep their bank."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import fast, make_folder

EXTRA = {
    "PANDA": [], "DN2": [], "SPADE": ["--model.levels=[1]", "--data.image_size=64"],
    "PatchCore": ["--model.levels=[1]", "--data.image_size=64"], "MSC": [], "DeepSVDD": [], "OCSVM": [],
    "MultiHeadRotNet": ["--model.depth=10", "--model.width=1"],
}  # fmt: skip


def words(folder, model):
    options = fast(folder, model=model, epochs=2)
    own = ("DeepSVDD", "MultiHeadRotNet", "OCSVM")
    options = [w for w in options if model not in own or "backbone" not in w]
    if model == "DeepSVDD":
        options.append("--model.pretrain_epochs=1")
    return [*options, *EXTRA[model]]


@pytest.mark.pictures
@pytest.mark.parametrize("left", [0, 7], ids=["none", "normal"])
@pytest.mark.parametrize("model", EXTRA)
def test_normal_images_alone_suffice(tmp_path, run, model, left):
    folder, whole = make_folder(tmp_path / "own"), make_folder(tmp_path / "whole")
    shutil.rmtree(folder / "test/stripe")
    if not left:
        shutil.rmtree(folder / "test")
    verb = "test" if model in ("DN2", "SPADE", "PatchCore", "OCSVM") else "fit"
    out = run(verb, *words(folder, model))
    assert len(re.findall(r"There is no \w+/auroc|No AUROC", out)) >= 1
    last = next(Path("runs/t/version_0/checkpoints").glob("last.ckpt"))
    assert (Path("runs/t/version_0/report.png").is_file()) == (left > 0)
    shutil.rmtree(folder)
    out = run("test", *words(whole, model), f"--ckpt_path={last}")  # elsewhere, without the images it was made from
    assert re.search(r"AUROC [\d.]+ of 13 images", out)


def test_what_waits_for_auroc_is_refused_before_training(folder, run):
    shutil.rmtree(folder / "test/stripe")
    for callback in ("EarlyStopping", "ModelCheckpoint"):
        with pytest.raises(SystemExit, match=f"{callback} monitors val/auroc, but the 7 images scored are all normal"):
            run("fit", *fast(folder), f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor=val/auroc")
        assert not list(Path("runs").rglob("*.ckpt"))


def test_ses_does_without_test_images_and_predict_refuses(folder, run):
    shutil.rmtree(folder / "test")
    run("fit", *fast(folder), "--trainer.callbacks+=SampleWiseEarlyStopping")
    assert list(Path("runs/t/version_0/checkpoints").glob("last.ckpt"))
    with pytest.raises(SystemExit, match="has no test images in .* to predict"):
        run("predict", *fast(folder), "--ckpt_path=last")
