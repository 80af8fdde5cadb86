import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from panda_lightning.search.coreset import greedy_coreset
from tests.search.test_knn import DEVICES


def plain(points: np.ndarray, size: int, first: int) -> list[int]:
    """One choice after the other, all distances in float64."""
    chosen, distance = [first], ((points - points[first]) ** 2).sum(axis=1)
    while len(chosen) < size:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "size"), [(1, 1), (40, 7), (40, 40), (3000, 500)])  # 3000: looks at 256 at a time
def test_choices_are_those_of_a_plain_loop(count, size, device):
    torch.manual_seed(count)
    points = torch.randn(count, 5) + torch.linspace(-3000, 3000, 5)  # products of such numbers leave no digit
    blocks = list(greedy_coreset(points.to(device), size, seed=3))
    rows = torch.cat(blocks).tolist()
    assert rows == plain(points.double().numpy(), size, rows[0])
    assert {len(block) for block in blocks} == {max(1, size // 100)}  # a progress bar moves


@pytest.mark.parametrize("dim", [128, 129])
def test_points_of_more_than_128_dimensions_are_projected_by_a_gaussian_matrix(dim):
    points = torch.randn(200, dim, generator=torch.Generator().manual_seed(0))
    rows = torch.cat(list(greedy_coreset(points, 60, seed=3))).tolist()
    generator = torch.Generator().manual_seed(3)
    first = int(torch.randint(200, (1,), generator=generator))
    matrix = torch.randn(dim, 128, generator=generator).double() if dim > 128 else torch.eye(dim).double()
    assert rows == plain((points.double() @ matrix).numpy(), 60, first)


@pytest.mark.parametrize("dim", [5, 200])
def test_settings_around_the_choices_change_nothing_and_stay_as_they_are_between_them(dim):
    points = torch.randn(300, dim, generator=torch.Generator().manual_seed(0))
    expected = torch.cat(list(greedy_coreset(points, 200, seed=0)))
    found = []
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for rows in greedy_coreset(points, 200):
                assert torch.is_autocast_enabled("cpu")
                assert torch.get_float32_matmul_precision() == "high"
                found.append(rows)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.cat(found), expected)


class Looks(TorchFunctionMode):
    """Writes down how many of how many points each look at all of them takes out."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.topk:
            self.found.append((args[1], len(args[0])))
        return func(*args, **(kwargs or {}))


def test_most_choices_are_made_among_a_thirty_second_of_the_points():
    points = torch.randn(16_000, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    saved = []
    with Looks() as looks, torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        list(greedy_coreset(points, 300))
    assert set(looks.found) == {(501, 16_000)}  # the 500 farthest, and the one that bounds all others
    assert len(looks.found) < 300 / 8
    assert not saved  # for a gradient


def test_the_seed_draws_the_first_choice_and_equal_points_are_taken_once():
    points = torch.zeros(50, 3)
    assert torch.cat(list(greedy_coreset(points, 50))).sort().values.tolist() == list(range(50))
    firsts = {int(next(greedy_coreset(points, 1, seed))) for seed in range(20)}
    assert len(firsts) > 5
    assert int(next(greedy_coreset(points, 1, 4))) == int(next(greedy_coreset(points, 1, 4)))


def test_a_projection_keeps_far_clusters_apart():
    torch.manual_seed(0)
    centres = torch.randn(10, 600) * 20
    points = (centres[:, None] + torch.randn(10, 30, 600) * 0.1).flatten(0, 1)
    rows = torch.cat(list(greedy_coreset(points, 10)))
    assert sorted((rows // 30).tolist()) == list(range(10))  # one of each
