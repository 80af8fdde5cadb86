import json
import os
import shutil

import pytest
import torch
from PIL import Image

from panda_lightning import DN2, OCSVM, PANDA, Backbone, DeepSVDD, Digits, MultiHeadRotNet, PandaError, PatchCore
from panda_lightning.networks.loading import BUNDLED
from tests.conftest import make_folder
from tests.detectors.test_base import ADAPT, digits, fitted, scored
from tests.detectors.test_panda import data, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("make", [lambda: DN2("panda_tiny"), OCSVM], ids=["DN2", "OCSVM"])
@pytest.mark.parametrize("options", [{"normal": "5"}, {"image_size": 64}, {"train_limit": 9}], ids=str)
def test_a_bank_that_a_test_made_is_made_anew_for_other_images(tmp_path, make, options):
    one = make()
    scored(tmp_path, one, digits())
    found, right = (scored(tmp_path, detector, digits(**options)) for detector in (one, make()))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PANDA("panda_tiny", fisher="ones", lr=0.1, grad_clip=1.0),
        lambda: DeepSVDD(pretrain_epochs=1, lr=1e-3),
        lambda: MultiHeadRotNet(depth=10, width=1),
    ],
    ids=["PANDA", "DeepSVDD", "RotNet"],
)
def test_a_second_fit_starts_from_fresh_weights_and_says_so(tmp_path, make, caplog):
    torch.manual_seed(0)
    one, other = make(), make()
    fitted(tmp_path, one, digits("3"), epochs=2)
    with caplog.at_level("INFO"):
        fitted(tmp_path, one, digits("5"), epochs=2)
    assert "starts again from its initial weights; to continue training, give ckpt_path" in caplog.text
    fitted(tmp_path, other, digits("5"), epochs=2)
    torch.testing.assert_close(one.scores.score, other.scores.score, rtol=1e-4, atol=1e-5)
    if isinstance(one, PANDA):
        assert torch.equal(one.centre, other.centre)


def test_view_and_problem_travel_in_the_checkpoint_and_are_the_default(tmp_path):
    detector, path = PANDA("panda_tiny", **ADAPT), tmp_path / "a.ckpt"
    fitted(tmp_path, detector, digits("5", protocol="leave_one_out")).save_checkpoint(path)
    loaded, plain = (
        PANDA.load_from_checkpoint(path),
        Digits(train_limit=20, test_limit=60),
    )  # names neither class nor size
    torch.testing.assert_close(scored(tmp_path, loaded, plain), detector.scores.score, rtol=1e-5, atol=0)
    assert (plain.view.size, plain.view.crop, plain.view.interpolation) == (32, "squash", "bicubic")
    assert plain.problem == {"normal_class": "5", "protocol": "leave_one_out"}
    assert (plain.image_size, plain.normal_class) == (None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 64}, "image_size=64, not 32"),
        ({"crop": "center"}, "crop=center, not squash"),
        ({"interpolation": "bilinear"}, "interpolation=bilinear, not bicubic"),
        ({"normal": "5"}, "normal_class=5, not 3"),
        ({"protocol": "leave_one_out"}, "protocol=leave_one_out, not one_vs_rest"),
    ],
)
@pytest.mark.parametrize("verb", ["test", "predict"])
def test_other_views_and_problems_are_refused(tmp_path, options, words, verb):
    detector, path = PANDA("panda_tiny", **ADAPT), tmp_path / "a.ckpt"
    runner = fitted(tmp_path, detector, digits())
    with pytest.raises(
        PandaError, match=f"made with data or arguments other than these .*{words}.*: use the old ones, or train again"
    ):
        getattr(trainer(tmp_path), verb)(detector, digits(**options))
    runner.save_checkpoint(path)
    with pytest.raises(PandaError, match=words):  # whether or not it comes by way of a file
        getattr(trainer(tmp_path), verb)(PANDA("panda_tiny"), digits(**options), ckpt_path=path)


def test_a_trained_detector_scores_images_elsewhere(tmp_path, folder, caplog):
    detector = PANDA("panda_tiny", **ADAPT)
    fitted(tmp_path, detector, data(folder))
    elsewhere = make_folder(tmp_path / "elsewhere", train=4)
    with caplog.at_level("INFO"):
        scores = scored(tmp_path, detector, data(elsewhere))
    assert "PANDA-Early keeps what it learned from ImageFolder's normal images" in caplog.text
    torch.testing.assert_close(scores, scored(tmp_path, detector, data(folder)), rtol=1e-5, atol=0)
    shutil.rmtree(elsewhere / "train")  # nor are any needed
    torch.testing.assert_close(scored(tmp_path, detector, data(elsewhere)), scores)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_limit": 19}, r"normal training images=19 \(.*\), not 20 \(.*\)"),
        ({"test_limit": 90}, r"test images=90 \(.*\), not 60"),
        ({"batch_size": 16}, "batch_size=16, not 32"),
        ({"image_size": 64}, "image_size=64, not 32"),
        ({"seed": 1}, "seed=1, not 0"),
        ({"normal": "5"}, "normal_class=5, not 3"),
    ],
)
def test_a_run_goes_on_with_the_same_data_only(tmp_path, options, words):
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits()).save_checkpoint(path)
    with pytest.raises(
        PandaError, match=f"{words}.*: to resume, use the old ones; to train with these, start a new run"
    ):
        fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits(**options), epochs=2, ckpt_path=path)


def test_a_run_goes_on_with_a_copy_of_its_images_but_not_with_others(tmp_path, folder):
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), data(folder)).save_checkpoint(path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    resumed = PANDA("panda_tiny", **ADAPT)
    fitted(tmp_path, resumed, data(copy), epochs=2, ckpt_path=path)
    assert resumed.epochs_trained == 2
    (copy / "train/spot/000.png").rename(copy / "train/spot/999.png")
    with pytest.raises(PandaError, match="normal training images=11"):
        fitted(tmp_path, PANDA("panda_tiny", **ADAPT), data(copy), epochs=2, ckpt_path=path)


def test_a_second_fit_starts_where_the_first_one_did(tmp_path):
    detector = PANDA("panda_tiny", **ADAPT)
    detector.load_backbone()
    with torch.no_grad():
        for p in detector.backbone.adapted().values():
            p.mul_(1.05)  # the user's own weights, which no file holds
    fitted(tmp_path, detector, digits())
    first = detector.scores.score
    fitted(tmp_path, detector, digits())
    torch.testing.assert_close(detector.scores.score, first)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda **more: PatchCore("panda_tiny", **{"coreset": 0.5, **more}), {"coreset": 0.1}),
        (lambda **more: OCSVM(**more), {"nu": 0.5}),
        (lambda **more: OCSVM(**more), {"inputs": "pixels"}),
        (lambda **more: DN2("panda_tiny", **more), {"k": 1}),
        (lambda **more: DN2("panda_tiny", **more), {"normalize": True}),
    ],
    ids=["coreset", "nu", "inputs", "k", "normalize"],
)
def test_arguments_may_be_changed_between_runs(tmp_path, make, change):
    one = make()
    scored(tmp_path, one, digits())
    for name, value in change.items():
        setattr(one, name, value)
    right = scored(tmp_path, make(**change), digits())
    torch.testing.assert_close(scored(tmp_path, one, digits()), right, rtol=1e-5, atol=1e-6)
    runner = trainer(tmp_path)
    runner.test(one, digits(), verbose=False)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(one).load_from_checkpoint(tmp_path / "a.ckpt")  # with the arguments as they were used
    torch.testing.assert_close(scored(tmp_path, loaded, digits()), right, rtol=1e-5, atol=1e-6)
    other = type(one).load_from_checkpoint(tmp_path / "a.ckpt", **{name: getattr(make(), name) for name in change})
    if set(change) <= set(one.SCORING):
        assert not torch.allclose(scored(tmp_path, other, digits()), right)
    else:
        with pytest.raises(PandaError, match=f"{next(iter(change))}="):
            scored(tmp_path, other, digits())


def test_precision_and_changed_files_are_part_of_where_a_bank_comes_from(tmp_path, folder):
    one = DN2("panda_tiny")
    trainer(tmp_path, precision="bf16-mixed").test(one, data(folder), verbose=False)
    right = scored(tmp_path, DN2("panda_tiny"), data(folder))
    torch.testing.assert_close(scored(tmp_path, one, data(folder)), right)
    for path in (folder / "train/spot").glob("*.png"):  # bitmaps are all of one size
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    module = data(folder)
    torch.testing.assert_close(scored(tmp_path, one, module), right)
    for path in (folder / "train/spot").glob("*.bmp"):
        Image.open(path).rotate(90).save(path)
        os.utime(path, ns=(1, 1))
    torch.testing.assert_close(scored(tmp_path, one, module), scored(tmp_path, DN2("panda_tiny"), data(folder)))


@pytest.mark.parametrize(
    "change", [{"ewc_weight": 5.0, "fisher": "ones"}, {"lr": 0.5}, {"normalize_loss": True}], ids=str
)
def test_a_run_goes_on_with_its_own_arguments_only(tmp_path, change):
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits()).save_checkpoint(path)
    with pytest.raises(PandaError, match=f"{next(iter(change))}=.*: to resume, use the old ones"):
        fitted(tmp_path, PANDA("panda_tiny", **{**ADAPT, **change}), digits(), epochs=2, ckpt_path=path)


def test_a_checkpoint_of_another_network_brings_its_own_start(tmp_path):
    shutil.copytree(BUNDLED / "panda_tiny", tmp_path / "net")
    other, path = f"local-dir:{tmp_path / 'net'}", tmp_path / "a.ckpt"
    config = json.loads((tmp_path / "net/config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.9, 0.1, 0.1]
    (tmp_path / "net/config.json").write_text(json.dumps(config))
    trained = PANDA(other, **ADAPT)
    fitted(tmp_path, trained, digits()).save_checkpoint(path)
    first, detector = trained.scores.score, PANDA(other, **ADAPT)
    detector.backbone = Backbone.pretrained("panda_tiny", adapt_stages=2)  # a user's, which the checkpoint replaces
    fitted(tmp_path, detector, digits())
    scored(tmp_path, detector, digits(), ckpt_path=path)
    fitted(tmp_path, detector, digits())
    torch.testing.assert_close(detector.scores.score, first)
