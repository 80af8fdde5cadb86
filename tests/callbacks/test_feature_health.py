import numpy as np
import pytest
import torch

from panda_lightning import DN2, MSC, PANDA
from panda_lightning.callbacks import Report
from tests.detectors.test_base import digits
from tests.detectors.test_panda import trainer

NAMES = {"effective_rank", "variance", "nearest", "nearest_spread", "neighbours_kept"}


def logged(runner):
    return {k.split("/")[1]: float(v) for k, v in runner.callback_metrics.items() if k.startswith("features/")}


@pytest.mark.parametrize("make", [PANDA, MSC])
def test_every_epoch_has_the_numbers_of_its_bank(tmp_path, make):
    detector = make("panda_tiny", lr=0.1, grad_clip=1.0, k=3)
    runner = trainer(tmp_path, 2)
    runner.fit(detector, digits())
    found = logged(runner)
    assert set(found) - {"ewc_share"} == NAMES
    bank = detector.scoring_space(detector.bank).numpy().astype(np.float64)
    gaps = np.square(bank[:, None] - bank[None]).sum(axis=2)
    np.fill_diagonal(gaps, np.inf)
    scores = np.sort(gaps, axis=1)[:, :3].sum(axis=1)
    assert found["nearest"] == pytest.approx(scores.mean(), rel=1e-4)
    assert found["nearest_spread"] == pytest.approx(scores.std(ddof=1) / scores.mean(), rel=1e-4)
    near = np.argsort(gaps, axis=1)[:, :10]
    first = detector.first_neighbours.numpy()
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(first, near, strict=True)]
    assert found["neighbours_kept"] == pytest.approx(np.mean(shares), abs=0.02)
    assert 0 < found["neighbours_kept"] < 1


def test_before_training_all_neighbours_are_kept(tmp_path):
    runner = trainer(tmp_path, 1)
    detector = PANDA("panda_tiny", lr=0.0, ewc_weight=0)
    runner.fit(detector, digits())
    assert logged(runner)["neighbours_kept"] == 1


def test_ewcs_share_is_that_of_the_loss(tmp_path):
    runner = trainer(tmp_path, 2)
    runner.fit(PANDA("panda_tiny", lr=0.1, grad_clip=1.0, fisher="ones", ewc_weight=10.0), digits())
    m = {k: float(v) for k, v in runner.callback_metrics.items()}
    assert m["features/ewc_share"] == pytest.approx(m["train/ewc"] / m["train/loss"])
    assert 0 < m["features/ewc_share"] < 1
    (report,) = (c for c in runner.callbacks if isinstance(c, Report))
    assert "features/ewc_share" not in report.rows[0]
    for row in report.rows[1:]:  # of this epoch, not of the one before
        expected = row["train/ewc"] / (row["train/ewc"] + row["train/compactness"])
        assert row["features/ewc_share"] == pytest.approx(expected, rel=1e-5)
    assert report.rows[2]["features/ewc_share"] == pytest.approx(m["features/ewc_share"], rel=1e-5)


def test_others_have_none(tmp_path):
    runner = trainer(tmp_path, 1)
    runner.test(DN2("panda_tiny"), digits(), verbose=False)
    runner = trainer(tmp_path, 1)
    runner.fit(PANDA("panda_tiny", centroids=4), digits())
    assert not logged(runner)


def test_a_run_that_goes_on_compares_with_the_first_neighbours(tmp_path):
    detector = PANDA("panda_tiny", lr=0.1, grad_clip=1.0)
    runner = trainer(tmp_path, 1)
    runner.fit(detector, digits())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = PANDA("panda_tiny", lr=0.1, grad_clip=1.0)
    trainer(tmp_path, 2).fit(again, digits(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(again.first_neighbours, detector.first_neighbours)


def test_a_collapse_to_few_directions_is_said_and_shrinking_is_not(tmp_path, monkeypatch, recwarn):
    class Shrinking(PANDA):
        def make_bank(self):
            return super().make_bank() * (0.01 if self.steps_trained else 1)

    trainer(tmp_path, 1).fit(Shrinking("panda_tiny"), digits())
    assert not [w for w in recwarn if "collapsed" in str(w.message)]

    class Collapsing(PANDA):
        def make_bank(self):
            bank = super().make_bank()
            return bank[:, :1] * torch.linspace(0, 1, bank.shape[1]) if self.steps_trained else bank

    with pytest.warns(
        UserWarning, match=r"have collapsed: their effective rank fell from \d[\d.]* before training to 1"
    ):
        trainer(tmp_path, 1).fit(Collapsing("panda_tiny"), digits())
