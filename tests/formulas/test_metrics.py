import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from panda_lightning import PandaError, auroc


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 7, 10_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auroc_is_scikit_learns(seed, levels, dtype):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.integers(0, levels, 1001) * 1.7e3, dtype=dtype)  # far outside [0, 1], with ties
    labels = rng.random(1001) < 0.3
    expected = roc_auc_score(labels, scores.numpy())
    assert auroc(scores, torch.tensor(labels)) == pytest.approx(expected, abs=1e-9)


def test_constant_scores_are_a_coin():
    assert auroc(torch.full((10,), 3.0), torch.arange(10) % 2) == 0.5


def test_separated_scores_are_one_where_a_sigmoid_would_saturate():
    assert auroc(torch.tensor([400.0, 401.0, 500.0, 501.0]), torch.tensor([0, 0, 1, 1])) == 1.0


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_one_kind_of_image_has_no_auroc(labels):
    assert np.isnan(auroc(torch.tensor([1.0, 2.0]), torch.tensor(labels)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad):
    with pytest.raises(PandaError, match="1 of 3 anomaly scores are NaN or infinite"):
        auroc(torch.tensor([1.0, bad, 2.0]), torch.tensor([0, 1, 1]))


# ---- pixels ----
