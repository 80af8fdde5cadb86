import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from panda_lightning import MSC, PANDA, Digits, MultiHeadRotNet
from panda_lightning.callbacks import health
from tests.detectors.test_panda import data, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock(pl.Callback):
    """A clock by which each batch takes 10 s and each validation 5 s: 35 s an epoch of three batches."""

    def __init__(self, unit=1.0):
        self.now, self.unit = 0.0, unit

    def monotonic(self):
        return self.now

    def on_train_batch_end(self, *_):
        self.now += 10 * self.unit

    def on_validation_end(self, *_):
        self.now += 5 * self.unit


@pytest.mark.parametrize(
    ("epochs", "options", "line"),
    [
        (4, {}, "An epoch takes 35 s with its validation: about 2 min for the remaining 3."),
        (3, {}, "An epoch takes 35 s with its validation: about 70 s for the remaining 2."),
        (4, {"limit_val_batches": 0}, "An epoch takes 30 s: about 2 min for the remaining 3."),
        (5, {"check_val_every_n_epoch": 2}, "An epoch takes 32 s with its validation: about 2 min for the remaining 3"),
        (4, {"val_check_interval": 1}, "An epoch takes 45 s with its validation: about 2 min for the remaining 3"),
        (4, {"enable_progress_bar": True}, "\nAn epoch takes 35 s"),
        (2, {}, None),  # one is left
        (1, {}, None),
        (4, {"fast_dev_run": True}, None),
        (4, {"max_steps": 9}, None),
        (4, {"max_time": timedelta(days=1)}, None),
        (-1, {"max_steps": 9}, None),
    ],
    ids=str,
)
def test_after_the_first_epoch_the_time_of_the_others_is_told(
    tmp_path, folder, monkeypatch, caplog, epochs, options, line
):
    clock = Clock()
    monkeypatch.setattr(health, "time", clock)
    quiet = {"enable_progress_bar": False, **options}
    run = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[clock], **quiet,
    )  # fmt: skip
    with caplog.at_level("INFO"):
        run.fit(PANDA("panda_tiny", ewc_weight=0), data(folder))
    assert caplog.text.count("An epoch takes") == (line is not None)
    assert line is None or line in caplog.text


def test_a_run_that_goes_on_tells_its_own_rest(tmp_path, folder, monkeypatch, caplog):
    first = trainer(tmp_path, 1)
    first.fit(PANDA("panda_tiny", ewc_weight=0), data(folder))
    first.save_checkpoint(tmp_path / "a.ckpt")
    clock = Clock(unit=60)
    monkeypatch.setattr(health, "time", clock)
    with caplog.at_level("INFO"):
        run = trainer(tmp_path, 6, callbacks=[clock])
        run.fit(PANDA("panda_tiny", ewc_weight=0), data(folder), ckpt_path=tmp_path / "a.ckpt")
    assert "An epoch takes 35 min with its validation: about 2 h 20 min for the remaining 4." in caplog.text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.04 s"), (1.23, "1.2 s"), (35.2, "35 s"), (89, "89 s"), (100, "2 min"), (6600, "110 min"),
        (7180, "2 h 0 min"), (93600, "26 h 0 min"), (12345, "3 h 26 min"),
    ],
)  # fmt: skip
def test_times_are_said_as_a_person_would(seconds, said):
    assert health._spoken(seconds) == said


# ---- training that moved nothing ----------------------------------------------------------------------------------


def moved_nothing(folder, detector, module, epochs=2, ckpt_path=None, **options):
    """What a run says of it, and its Trainer."""
    run = trainer(folder, epochs, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(detector, module, ckpt_path=ckpt_path)
    return [str(w.message) for w in caught if "changed almost nothing" in str(w.message)], run


def digits(normal=9):
    return Digits(normal_class=normal, image_size=64, crop="squash", batch_size=8, test_limit=40)


DEMO = {"grad_clip": 0.3, "ewc_weight": 100}  # make demo's; conf/digits.yaml has the published steps


@pytest.mark.parametrize("normal", [9, 3])
@pytest.mark.parametrize(("epochs", "options", "still"), [(4, {}, True), (2, DEMO, False), (1, DEMO, False)], ids=str)
def test_digits_stay_where_they_are_at_published_steps_but_not_in_the_demo(tmp_path, normal, epochs, options, still):
    detector = PANDA("panda_tiny", **options)
    said, _ = moved_nothing(tmp_path, detector, digits(normal), epochs)
    assert len(said) == still
    before = detector.compactness_before
    if still:
        assert said[0] == (
            f"Training changed almost nothing: compactness is {detector.compactness():.4g} after "
            f"{detector.steps_trained} steps and was {before:.4g} before, with gradients clipped to 0.001: train more "
            "epochs, or raise model.grad_clip or model.lr."
        )
    else:
        assert detector.compactness() < 0.97 * before


def test_compactness_is_that_of_the_normal_images(tmp_path, folder):
    detector = PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0, lr=0.1)
    trainer(tmp_path, 1).fit(detector, data(folder))
    untrained = PANDA("panda_tiny")
    untrained.load_backbone()
    for network, value in ((untrained, detector.compactness_before), (detector, detector.compactness())):
        module = data(folder)
        images = module.normal_dataloader().dataset.__getitems__(range(11))["image"]
        with torch.no_grad():
            expected = (network.backbone(images) - detector.centre).square().mean()
        assert value == pytest.approx(float(expected), rel=1e-4)


def test_labels_have_no_part_in_it(tmp_path, folder):
    said, _ = moved_nothing(tmp_path, PANDA("panda_tiny"), data(folder), limit_val_batches=0)
    assert len(said) == 1


def test_a_run_that_goes_on_compares_with_the_untrained_network(tmp_path, folder):
    said, run = moved_nothing(tmp_path, PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0, lr=0.1), data(folder))
    assert not said
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0, lr=0.1)
    with torch.no_grad():
        said, _ = moved_nothing(tmp_path, again, data(folder), 3, ckpt_path=tmp_path / "a.ckpt")
    assert not said
    assert again.compactness_before == run.lightning_module.compactness_before


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: MSC("panda_tiny"), {}),  # lowers another loss
        (lambda: MultiHeadRotNet(depth=10, width=1), {}),  # has no start that it could stay at
        (lambda: PANDA("panda_tiny"), {"fast_dev_run": True}),
    ],
    ids=["MSC", "RotNet", "fast_dev_run"],
)
def test_of_other_training_nothing_is_said(tmp_path, folder, make, options):
    assert moved_nothing(tmp_path, make(), data(folder), 1, **options)[0] == []


@pytest.mark.parametrize(
    ("after", "distance", "clip", "ending"),
    [
        (0.995, 0.05, 1e-3, "clipped to 0.001: train more epochs, or raise model.grad_clip or model.lr."),
        (1.005, 0.05, None, "with lr 0.01: train more epochs, or raise model.lr."),
        (0.98, 0.05, 1e-3, None),
        (1.02, 0.05, 1e-3, None),
        (0.995, 0.2, 1e-3, None),  # weights went elsewhere, though features are as close as before
    ],
)
def test_features_and_weights_must_both_be_where_they_were(after, distance, clip, ending):
    detector = SimpleNamespace(
        compactness_before=1.0, compactness=lambda: after, start={"a": torch.ones(10, 10)}, terms=("compactness",),
        grad_clip=clip, lr=0.01, steps_trained=45, enough=0.0,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        health._say_if_too_little(detector, torch.tensor(distance))
    assert [str(w.message)[-len(ending or "") :] for w in caught] == ([ending] if ending else [])


# ---- training that raises its loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "weight", "rises"), [(0.1, 1e3, True), (0.0, 1e3, False), (0.1, 0.0, False)])
def test_weight_decay_that_ewc_cannot_hold_is_said_once(tmp_path, folder, decay, weight, rises):
    detector = PANDA("panda_tiny", ewc_weight=weight, fisher="ones", weight_decay=decay)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, 4, check_val_every_n_epoch=4).fit(detector, data(folder))
    said = [str(w.message) for w in caught if "raises its loss" in str(w.message)]
    assert len(said) == rises
    if rises:
        start = sum(float(p.square().sum()) for p in detector.start.values()) ** 0.5
        assert (
            f" and was {detector.compactness_before:.4g} before: weight decay pulls {decay * start / 1e-3:.2g} "
            in said[0]
        )
        assert said[0].endswith("clipped to 0.001, so set model.weight_decay=0 or raise model.grad_clip.")


@pytest.mark.parametrize(
    ("clip", "ending"),
    [(1e-3, "before: lower model.lr or model.grad_clip."), (None, "before: lower model.lr, or set model.grad_clip.")],
)
def test_other_training_that_raises_its_loss_is_to_go_slower(clip, ending):
    detector = SimpleNamespace(
        compactness_before=1.0, start={"a": torch.ones(4)}, weight_decay=1e-4, grad_clip=clip, epochs_trained=2.0
    )
    with pytest.warns(UserWarning, match="it is 3 after 2 epochs and was 1") as caught:
        health._say_why_it_rises(detector, 3.0)
    assert str(caught[0].message).endswith(ending)
