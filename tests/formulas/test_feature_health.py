import numpy as np
import pytest
import torch

from panda_lightning.formulas.feature_health import effective_rank, kept, variance


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_effective_rank_is_that_of_singular_values(shape):
    x = np.random.default_rng(0).normal(size=shape) @ np.diag(np.linspace(1, 5, shape[1])) + 3
    sigma = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    share = sigma[sigma > 1e-9] / sigma.sum()
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_effective_rank_counts_equal_directions_and_a_point_has_one():
    assert effective_rank(torch.cat([torch.eye(6), -torch.eye(6)])) == pytest.approx(6)
    line = torch.arange(9.0)[:, None] * torch.tensor([[1.0, 2.0]])
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.ones(5, 3)) == 1


def test_variance_is_numpys():
    x = np.random.default_rng(1).normal(size=(30, 7))
    assert variance(torch.from_numpy(x)) == pytest.approx(x.var(axis=0).sum())


def test_kept_is_a_share_of_sets():
    before, now = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 1, 9], [7, 8, 9]])
    assert kept(before, now) == pytest.approx(2 / 6)
    assert kept(before, before.flip(1)) == 1
