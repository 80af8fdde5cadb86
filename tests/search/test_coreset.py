import numpy as np
import pytest
import torch

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
    points = torch.randn(count, 5) + 50
    blocks = list(greedy_coreset(points.to(device), size, seed=3))
    rows = torch.cat(blocks).tolist()
    assert rows == plain(points.double().numpy(), size, rows[0])
    assert len(blocks) >= min(size, 100)  # a progress bar moves


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
