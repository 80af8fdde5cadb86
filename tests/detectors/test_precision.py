"""What half precision does to scores, maps and weights."""

import pytest
import torch

from panda_lightning import DN2, MSC, OCSVM, PANDA, PANDAOE, SPADE, DeepSVDD, MultiHeadRotNet, PatchCore
from tests.conftest import picture
from tests.detectors.test_base import digits
from tests.detectors.test_panda import trainer

MAKE = {
    "DN2": lambda: DN2("panda_tiny"),
    "OCSVM": lambda: OCSVM(inputs="pixels"),
    "PatchCore": lambda: PatchCore("panda_tiny", coreset=0.5, sigma=1.0),
    "SPADE": lambda: SPADE("panda_tiny", k=3),
    "PANDA": lambda: PANDA("panda_tiny"),
    "MSC": lambda: MSC("panda_tiny"),
    "PANDAOE": lambda: PANDAOE("panda_tiny"),
    "MultiHeadRotNet": lambda: MultiHeadRotNet(depth=10, width=1),
    "DeepSVDD": lambda: DeepSVDD(pretrain_epochs=0),
}
TRAINED = ("PANDA", "MSC", "PANDAOE", "MultiHeadRotNet", "DeepSVDD")


def scores(tmp_path, name, precision):
    detector = MAKE[name]()
    module = digits(outliers=str(tmp_path / "outliers") if name == "PANDAOE" else None)
    runner = trainer(tmp_path, 1, precision=precision)
    (runner.fit if name in TRAINED else runner.test)(detector, module)
    return detector.scores.score


@pytest.mark.parametrize("name", MAKE)
def test_scores_of_half_precision_tie_no_more_than_others(tmp_path, name):
    (tmp_path / "outliers").mkdir()
    for i in range(6):
        picture("stripe", i).save(tmp_path / "outliers" / f"{i}.png")
    whole, half = (scores(tmp_path, name, precision) for precision in ("32-true", "bf16-mixed"))
    assert half.dtype == whole.dtype
    assert len(half.unique()) >= 0.95 * len(whole.unique())


@pytest.mark.parametrize("name", ["PatchCore", "SPADE"])
def test_maps_of_half_precision_hold_as_many_values(tmp_path, name):
    outputs = trainer(tmp_path, precision="bf16-mixed").predict(MAKE[name](), digits())
    maps = torch.cat([output["map"] for output in outputs])
    assert maps.dtype == torch.float32
    assert len(maps.unique()) > 0.5 * maps.numel()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("fisher", ["auto", "ones"])
def test_ewc_works_in_any_precision(tmp_path, precision, fisher):
    detector = PANDA("panda_tiny", fisher=fisher, ewc_weight=100, grad_clip=0.1)
    runner = trainer(tmp_path, 2, precision=precision)
    runner.fit(detector, digits())
    assert torch.isfinite(runner.callback_metrics["train/ewc"])
    assert float(runner.callback_metrics["train/distance_from_start"]) > 0
    assert 0.8 < float(runner.callback_metrics["val/auroc"]) <= 1


@pytest.mark.parametrize("name", ["DN2", "PatchCore"])
def test_weights_are_what_they_were_after_a_test_in_half_precision(tmp_path, name):
    detector = MAKE[name]()
    trainer(tmp_path).test(detector, digits(), verbose=False)
    before, score = {k: v.clone() for k, v in detector.backbone.state_dict().items()}, detector.scores.score
    trainer(tmp_path, precision="bf16-true").test(detector, digits(), verbose=False)
    assert not torch.equal(detector.scores.score, score)
    for key, value in detector.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    trainer(tmp_path).test(detector, digits(), verbose=False)
    torch.testing.assert_close(detector.scores.score, score, rtol=1e-5, atol=1e-6)


def test_weights_are_what_they_were_after_a_test_in_half_precision_that_failed(tmp_path, monkeypatch):
    detector = MAKE["DN2"]()
    trainer(tmp_path).test(detector, digits(), verbose=False)
    before = {k: v.clone() for k, v in detector.backbone.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(detector, "anomaly_score", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path, precision="bf16-true").test(detector, digits(), verbose=False)
    trainer(tmp_path).test(detector, digits(), verbose=False)
    for key, value in detector.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_weights_trained_in_half_precision_are_kept_as_float32(tmp_path):
    detector = PANDA("panda_tiny", ewc_weight=0, grad_clip=1.0)
    trainer(tmp_path, 1, precision="bf16-true").fit(detector, digits())
    assert {p.dtype for p in detector.parameters()} == {torch.float32}
    trained = next(iter(detector.backbone.adapted().values()))
    assert torch.equal(trained, trained.bfloat16().float())
    trainer(tmp_path).test(detector, digits(), verbose=False)
    assert {p.dtype for p in detector.parameters()} == {torch.float32}


def test_a_step_whose_gradients_overflow_counts_in_no_mean(monkeypatch):
    detector = PANDA("panda_tiny")
    detector.load_backbone()
    logged = []
    monkeypatch.setattr(
        detector, "log", lambda name, value, **how: logged.append((float(value), int(how["batch_size"])))
    )
    for gradient in (1.0, torch.inf):
        for p in detector.trained():
            p.grad = torch.full_like(p, gradient)
        detector.configure_gradient_clipping(torch.optim.SGD(detector.trained(), lr=0.1))
    count = sum(p.numel() for p in detector.trained())
    assert logged == [(pytest.approx(count**0.5), 1), (0.0, 0)]
