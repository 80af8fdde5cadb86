"""What a run derives, and what later runs make of it."""

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from panda_lightning import DN2, PANDA, PANDAOE, DeepSVDD, Digits, MultiHeadRotNet, PandaError
from tests.detectors.test_panda import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPT = {"ewc_weight": 0, "grad_clip": 10.0, "lr": 0.1}


def digits(normal="3", **options):
    return Digits(
        **{"normal_class": normal, "image_size": 32, "crop": "squash", "train_limit": 20, "test_limit": 60, **options}
    )


def scored(tmp_path, detector, module, **options):
    trainer(tmp_path).test(detector, module, verbose=False, **options)
    return detector.scores.score


def fitted(tmp_path, detector, module, epochs=1, **options):
    runner = trainer(tmp_path, epochs)
    runner.fit(detector, module, **options)
    return runner


def test_a_detector_leaves_a_data_module_as_it_was(tmp_path):
    module = digits()
    before = module.val_dataloader().dataset.pixels.clone()
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), module)
    after = module.val_dataloader().dataset
    assert after.hidden is None
    assert after.pixels.shape == before.shape
    torch.testing.assert_close(
        scored(tmp_path, DN2("panda_tiny"), module), scored(tmp_path, DN2("panda_tiny"), digits())
    )
    other = scored(tmp_path, DN2("panda_tiny"), digits(interpolation="bilinear"))
    assert not torch.equal(other, scored(tmp_path, DN2("panda_tiny"), module))  # of 8 px digits, made larger


def test_a_bank_follows_the_weights(tmp_path):
    detector = DN2("panda_tiny")
    before = scored(tmp_path, detector, digits())
    with torch.no_grad():
        for p in detector.backbone.parameters():
            p.mul_(1.1)
    after = scored(tmp_path, detector, digits())
    fresh = DN2("panda_tiny")
    fresh.load_backbone()
    fresh.backbone.load_state_dict(detector.backbone.state_dict())
    assert torch.equal(after, scored(tmp_path, fresh, digits()))
    assert not torch.allclose(after, before)


def test_a_test_after_fit_leaves_its_checkpoint_alone(tmp_path):
    runner = trainer(
        tmp_path, 1, logger=CSVLogger(tmp_path, name="x"), enable_checkpointing=True,
        callbacks=[ModelCheckpoint(save_last=True)],
    )  # fmt: skip
    detector, module = PANDA("panda_tiny", **ADAPT), digits()
    runner.fit(detector, module)
    runner.test(detector, module, verbose=False)
    runner.test(DN2("panda_tiny"), module, verbose=False)  # which saves its bank beside it
    folder = tmp_path / "x/version_0/checkpoints"
    assert {"last.ckpt", "last-v1.ckpt"} < {path.name for path in folder.iterdir()}
    resumed = PANDA("panda_tiny", **ADAPT)
    fitted(tmp_path, resumed, digits(), epochs=2, ckpt_path=folder / "last.ckpt")
    assert resumed.epochs_trained == 2


def test_fit_trains_batchnorm_whatever_came_before(tmp_path):
    torch.manual_seed(0)
    one, other = (DeepSVDD(pretrain_epochs=1, lr=1e-3) for _ in range(2))
    fitted(tmp_path, one, digits())
    trainer(tmp_path).predict(one, digits())  # after which Lightning leaves it in eval mode
    fitted(tmp_path, one, digits(), epochs=2)
    fitted(tmp_path, other, digits(), epochs=2)
    torch.testing.assert_close(one.scores.score, other.scores.score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.pop("_extra_state"), "has no format number: it is not from this project, or too old"),
        (
            lambda state: state["_extra_state"].update(format=1),
            "has format 1; this version reads format 3. Train again",
        ),
    ],
)
def test_a_checkpoint_of_another_format_is_refused(tmp_path, spoil, words):
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, PANDA("panda_tiny", **ADAPT), digits()).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    spoil(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    for use in (
        lambda: PANDA.load_from_checkpoint(path),
        lambda: scored(tmp_path, PANDA("panda_tiny"), digits(), ckpt_path=path),
        lambda: DN2(str(path)).load_backbone(),
    ):
        with pytest.raises(PandaError, match=words):
            use()


def test_a_checkpoint_of_the_format_before_is_read(tmp_path):
    path = tmp_path / "a.ckpt"
    detector = PANDA("panda_tiny", **ADAPT)
    fitted(tmp_path, detector, digits()).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["_extra_state"]["format"] = 2
    torch.save(checkpoint, path)
    score = scored(tmp_path, PANDA.load_from_checkpoint(path), digits())
    torch.testing.assert_close(score, detector.scores.score)


def test_a_fit_that_ended_before_its_first_step_leaves_nothing_that_scores(tmp_path):
    detector = PANDA("panda_tiny", **ADAPT)
    fitted(tmp_path, detector, digits())
    before = detector.scores.score
    for spoilt in (digits(image_size=8), digits(outliers="somewhere")):
        with pytest.raises(PandaError):
            fitted(tmp_path, detector, spoilt)
        with pytest.raises(PandaError, match="is untrained"):
            scored(tmp_path, detector, digits())
    fitted(tmp_path, detector, digits())
    torch.testing.assert_close(detector.scores.score, before)


def test_averaged_weights_are_saved_with_their_own_state(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    runner = trainer(tmp_path, 2, callbacks=[average])
    detector = PANDA("panda_tiny", **ADAPT)
    runner.fit(detector, digits(batch_size=5))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PANDA.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.steps_trained == 8
    assert scored(tmp_path, loaded, digits(batch_size=5)).isfinite().all()


@pytest.mark.parametrize(
    ("detector", "build", "name", "value"),
    [
        (DN2("panda_tiny"), DN2.load_backbone, "pool", "avg"),
        (PANDA("panda_tiny"), PANDA.load_backbone, "adapt_stages", 1),
        (PANDAOE("panda_tiny"), PANDAOE.load_backbone, "adapt", "norm"),
        (PANDA("panda_tiny"), PANDA.load_backbone, "lora_rank", 2),
        (DN2("panda_tiny"), DN2.load_backbone, "weights", "x.safetensors"),
        (DeepSVDD(), lambda detector: detector.build(32), "network", "mnist"),
        (MultiHeadRotNet(10, 1), lambda _: None, "width", 2),
    ],
)
def test_what_makes_a_network_stays_when_it_is_there(detector, build, name, value):
    before = getattr(detector, name)
    if type(detector) is not MultiHeadRotNet:  # whose constructor makes it
        setattr(detector, name, value)
        setattr(detector, name, before)
    build(detector)
    setattr(detector, name, before)
    with pytest.raises(PandaError, match=f"^{name}={value} would make another network than .* has already"):
        setattr(detector, name, value)
    assert getattr(detector, name) == before
