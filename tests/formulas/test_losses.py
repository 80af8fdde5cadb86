import numpy as np
import pytest
import torch
from torch.nn import functional as F

from panda_lightning.formulas import losses


def test_compactness_is_the_mean_square_of_a_plain_loop():
    rng = np.random.default_rng(0)
    features, centre = rng.normal(size=(5, 7)), rng.normal(size=7)
    expected = [sum((features[b, d] - centre[d]) ** 2 for d in range(7)) / 7 for b in range(5)]
    got = losses.compactness(torch.tensor(features), torch.tensor(centre))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_ewc_is_half_the_weighted_square_of_a_plain_loop():
    rng = np.random.default_rng(1)
    shapes = [(3, 2), (4,), ()]
    params, start, fisher = ([rng.random(s) for s in shapes] for _ in range(3))
    expected = 0.0
    for p, s, f in zip(params, start, fisher, strict=True):
        for i in np.ndindex(np.shape(p)):
            expected += 0.5 * np.asarray(f)[i] * (np.asarray(p)[i] - np.asarray(s)[i]) ** 2
    got = losses.ewc(*([torch.tensor(x) for x in xs] for xs in (params, start, fisher)))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_ewc_pulls_back_with_force_fisher_times_distance():
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    losses.ewc([param], [torch.zeros(2)], [torch.tensor([3.0, 0.0])]).backward()
    assert param.grad is not None
    assert param.grad.tolist() == [3.0, 0.0]


def test_ewc_has_the_gradient_that_differences_give():
    torch.manual_seed(0)
    params = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.randn((), dtype=torch.float64)]
    start, fisher = ([torch.rand(p.shape, dtype=torch.float64) for p in params] for _ in range(2))
    params[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda *p: losses.ewc(p, start, fisher), params)


@pytest.mark.parametrize(("options", "tau"), [({}, 0.25), ({"temperature": 2.0}, 2.0)])
def test_mean_shifted_is_that_of_a_plain_loop(options, tau):
    rng = np.random.default_rng(2)
    first, second, centre = rng.normal(size=(4, 5)), rng.normal(size=(4, 5)), rng.normal(size=5)
    views = [v - centre for v in (*first, *second)]
    views = [v / np.sqrt(sum(v**2)) for v in views]
    expected = 0.0
    for i in range(8):
        similar = {m: np.exp(sum(views[i] * views[m]) / tau) for m in range(8) if m != i}
        expected -= np.log(similar[(i + 4) % 8] / sum(similar.values())) / 8
    got = losses.mean_shifted(*map(torch.tensor, (first, second, centre)), **options)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_mean_shifted_has_the_gradient_that_differences_give():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    centre = torch.randn(4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda *views: losses.mean_shifted(*views, centre), (first, second))


def test_the_soft_boundary_is_that_of_a_plain_loop():
    distances, radius, nu = [0.1, 4.0, 9.0, 16.0], 2.0, 0.1
    expected = sum(radius**2 + max(0.0, d - radius**2) / nu for d in distances) / 4
    got = losses.soft_boundary(torch.tensor(distances), torch.tensor(radius), nu).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_are_told_apart_in_full_precision_whatever_the_runs(dtype):
    first, second = F.normalize(torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)), dim=2)
    centre = first.mean(dim=0)
    expected = losses.mean_shifted(first, second, centre)
    with torch.autocast("cpu", dtype):
        found = losses.mean_shifted(first, second, centre)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ewc_of_half_weights_is_float32s(dtype):
    generator = torch.Generator().manual_seed(0)
    start = (300 * torch.rand(50, generator=generator)).to(dtype)  # squares of the moves overflow float16
    params = (start + 300 * torch.rand(50, generator=generator)).to(dtype).requires_grad_()
    fisher = torch.rand(50, generator=generator)
    found = losses.ewc([params], [start], [fisher])
    expected = (0.5 * fisher.double() * (params.detach().double() - start.double()).square()).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.backward()
    assert params.grad.dtype == dtype
    torch.testing.assert_close(
        params.grad.float(), fisher * (params.detach().float() - start.float()), rtol=0.01, atol=0
    )
