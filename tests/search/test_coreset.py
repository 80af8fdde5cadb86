from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from panda_lightning import PandaError
from panda_lightning.search import coreset
from panda_lightning.search.coreset import Points, Reduced, everywhere, greedy_coreset
from tests.search.test_knn import DEVICES


def greedy(points, size, seed=0, numbers=None):
    """Numbers (size,), and squared distances."""
    return tuple(torch.cat(column) for column in zip(*greedy_coreset(points, size, seed, numbers), strict=True))


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
    blocks = [rows for rows, _ in greedy_coreset(points.to(device), size, seed=3)]
    rows = torch.cat(blocks).tolist()
    assert rows == plain(points.double().numpy(), size, rows[0])
    assert {len(block) for block in blocks} == {max(1, size // 100)}  # a progress bar moves


@pytest.mark.parametrize("dim", [128, 129])
def test_points_of_more_than_128_dimensions_are_projected_by_a_gaussian_matrix(dim):
    points = torch.randn(200, dim, generator=torch.Generator().manual_seed(0))
    rows = greedy(points, 60, seed=3)[0].tolist()
    generator = torch.Generator().manual_seed(3)
    first = int(torch.randint(200, (1,), generator=generator))
    matrix = torch.randn(dim, 128, generator=generator).double() if dim > 128 else torch.eye(dim).double()
    assert rows == plain((points.double() @ matrix).numpy(), 60, first)


@pytest.mark.parametrize("dim", [5, 200])
def test_settings_around_the_choices_change_nothing_and_stay_as_they_are_between_them(dim):
    points = torch.randn(300, dim, generator=torch.Generator().manual_seed(0))
    expected, _ = greedy(points, 200)
    found = []
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for rows, _ in greedy_coreset(points, 200):
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
    found = Counter(looks.found)
    assert set(found) == {(2000, 16_000), (501, 16_000)}  # those to compare; the 500 farthest, and the next
    assert found[501, 16_000] < 300 / 5
    assert not saved  # for a gradient


def test_the_seed_draws_the_first_choice_and_equal_points_are_taken_once():
    points = torch.zeros(50, 3)
    assert greedy(points, 50)[0].sort().values.tolist() == list(range(50))
    firsts = {int(greedy(points, 1, seed)[0]) for seed in range(20)}
    assert len(firsts) > 5
    assert int(greedy(points, 1, 4)[0]) == int(greedy(points, 1, 4)[0])


def test_a_projection_keeps_far_clusters_apart():
    torch.manual_seed(0)
    centres = torch.randn(10, 600) * 20
    points = (centres[:, None] + torch.randn(10, 30, 600) * 0.1).flatten(0, 1)
    rows, _ = greedy(points, 10)
    assert sorted((rows // 30).tolist()) == list(range(10))  # one of each


@pytest.mark.parametrize("dim", [5, 200, 800])  # as they are; projected at each look; projected once
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_points_in_blocks_are_chosen_as_those_of_one(dim, dtype):
    points = torch.randn(5000, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    held = Points(dim, dtype, points.device, block=700)
    for part in torch.split(points.mT.contiguous().mT, 450):  # with other strides, as features come
        held.append(part.float())
    assert len(held) == 5000
    ours, theirs = greedy(held, 300, seed=1), greedy(points, 300, seed=1)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert torch.equal(held.take(ours[0]), points[ours[0]])
    assert torch.equal(held.moved(ours[0]), points[ours[0]])
    assert len(held) == 0


@pytest.mark.parametrize(("count", "dim"), [(40, 5), (3000, 5), (3000, 200)])
def test_the_distance_of_the_next_choice_is_the_covering_radius(count, dim):
    points = torch.randn(count, dim, generator=torch.Generator().manual_seed(count))
    if dim > 128:
        generator = torch.Generator().manual_seed(3)
        torch.randint(count, (1,), generator=generator)
        space = points.double() @ torch.randn(dim, 128, generator=generator).double()
    else:
        space = points.double()
    rows, squared = greedy(points, 30, seed=3)
    assert squared[0] == torch.inf
    for n in range(1, 30):
        radius = torch.cdist(space, space[rows[:n]]).amin(dim=1).max()
        assert float(squared[n]) == pytest.approx(float(radius) ** 2, rel=1e-4)


def dealt(count, world, sizes):
    """Numbers of the points of each process, in an order of its own: images are dealt out, the last comes first."""
    bounds = torch.arange(count).split(sizes)
    return [torch.cat([*bounds[rank::world]][::-1] or [torch.arange(0)]) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("count", "size", "dim"), [(40, 40, 5), (3000, 500, 5), (3000, 60, 200)])
def test_processes_choose_what_one_would(as_processes, world, count, size, dim):
    points = torch.randn(count, dim, generator=torch.Generator().manual_seed(count))
    expected = greedy(points, size, seed=3)
    numbers = dealt(count, world, 20)

    def choose(rank):
        held = Points(dim, points.dtype, points.device, block=256)
        held.append(points[numbers[rank]])
        found = greedy(held, size, 3, numbers[rank])
        return *found, everywhere(held, numbers[rank], found[0]), len(held)

    for rows, squared, bank, left in as_processes(world, choose):
        assert torch.equal(rows, expected[0])
        torch.testing.assert_close(squared, expected[1], rtol=1e-4, atol=1e-4)
        assert torch.equal(bank, points[expected[0]])
        assert left == 0


def test_a_process_may_have_no_points_and_equal_ones_are_taken_in_their_order(as_processes):
    points = torch.cat([torch.zeros(300, 3), torch.ones(300, 3), torch.full((1, 3), 9.0)])
    expected = greedy(points, 601, seed=0)[0]
    assert sorted(expected.tolist()) == list(range(601))
    assert expected[3:].tolist() == sorted(expected[3:].tolist())
    numbers = [torch.arange(400, 601), torch.arange(0), torch.arange(400)]
    for rows, _ in as_processes(3, lambda rank: greedy(points[numbers[rank]], 20, 0, numbers[rank])):
        assert torch.equal(rows, expected[:20])


def test_many_equal_points_are_taken_without_a_look_for_each():
    points = torch.cat([torch.zeros(9000, 3), torch.ones(1, 3)])
    with Looks() as looks:
        rows, squared = greedy(points, 700)
    assert len(set(rows.tolist())) == 700
    assert squared[2:].abs().max() < 1e-9
    assert len(looks.found) < 30


def test_a_process_looks_at_its_own_points_alone(as_processes):
    points = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    numbers = dealt(4000, 2, 20)
    seen = {}

    class Own(Points):
        def take(self, rows):
            seen[len(self)] = max(seen.get(len(self), 0), int(rows.max()) if len(rows) else 0)
            return super().take(rows)

    def choose(rank):
        held = Own(8, points.dtype, points.device)
        held.append(points[numbers[rank]])
        return greedy(held, 100, 0, numbers[rank])[0]

    first, second = as_processes(2, choose)
    assert torch.equal(first, second)
    assert seen == {2000: 1999}


# ---- in chunks -----------------------------------------------------------------------------------------------------


def radius(points, centres):
    return float(torch.cdist(points.double(), centres.double()).amin(dim=1).max())


def reduced(points, size, chunk, seed=0):
    """Points chosen in chunks, and the two radii that are said of them."""
    stream = Reduced(size, chunk, points.shape[1], points.dtype, points.device, seed)
    for part in torch.split(points, 3):
        stream.append(part)
    rows = stream.finish()
    assert len(stream) == len(points)
    assert torch.equal(stream.kept.take(torch.arange(len(rows))), points[rows])
    assert len(rows) <= size * -(-len(points) // chunk)
    if len(rows) <= size:
        return rows, stream.squared**0.5, 0.0
    chosen, squared = greedy(stream.kept, size + 1, seed)
    return rows[chosen[:-1]], stream.squared**0.5, float(squared[-1].clamp(min=0)) ** 0.5


def streams():
    """Small sets, some as they come worst: cluster after cluster, equal points, one far away at the end."""
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        yield torch.randn(14, 2, generator=draw)
        clusters = torch.randn(4, 1, 2, generator=draw) * 10 + torch.randn(4, 4, 2, generator=draw) * 0.1
        yield clusters.flatten(0, 1)
        yield torch.cat([torch.randn(13, 2, generator=draw), torch.tensor([[50.0, 50.0]])])
        yield torch.randint(0, 3, (15, 2), generator=draw).float()
        yield torch.exp(torch.arange(14.0)).unsqueeze(1)  # each chunk far larger than those before
        yield torch.exp(-torch.arange(14.0)).unsqueeze(1)


@pytest.mark.parametrize(("size", "chunk"), [(1, 4), (2, 3), (2, 5), (3, 5), (3, 7)])
def test_a_choice_in_chunks_covers_within_four_times_the_least_radius(size, chunk):
    worst = 0.0
    for points in streams():
        least = min(radius(points, points[list(rows)]) for rows in combinations(range(len(points)), size))
        rows, before, after = reduced(points, size, chunk)
        assert len(rows) <= size
        found, slack = radius(points, points[rows]), 1e-3 + 1e-5 * float(points.abs().max())
        assert found <= before + after + slack  # as is said
        assert max(before, after) / 2 <= least + slack  # likewise
        assert found <= 4 * least + slack
        worst = max(worst, found / least if least else 0)
    assert worst > 1.2  # sets that are too easy would show nothing


def test_chunks_that_are_near_enough_already_leave_less():
    points = torch.cat([torch.randn(100, 3) * 100, torch.randn(300, 3)])
    stream = Reduced(20, 100, 3, points.dtype, points.device, 0)
    stream.append(points)
    rows = stream.finish()
    assert (rows < 100).sum() == 20
    assert len(rows) < 20 + 3 * 5
    assert radius(points, points[rows]) <= stream.squared**0.5 * (1 + 1e-4)


def test_one_chunk_is_greedy_choice():
    points = torch.randn(500, 6)
    rows, before, after = reduced(points, 40, 1000, seed=2)
    chosen, squared = greedy(points, 41, seed=2)
    assert set(rows.tolist()) == set(chosen[:-1].tolist())
    assert after == 0.0
    assert before == pytest.approx(float(squared[-1]) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("dim", "itemsize"), [(128, 4), (152, 4), (384, 4), (1536, 4), (1536, 2), (64, 4)])
def test_greedy_choice_takes_a_fifth_more_than_all_points(dim, itemsize):
    count = 2_000_000
    assert coreset.memory_for(count, dim, itemsize) <= (1.2 if dim >= 128 else 1.35) * count * dim * 4
    small = coreset.memory_in_chunks(count, count // 100, 10, dim, itemsize)
    assert small < 0.35 * coreset.memory_for(count, dim, itemsize)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_points_without_distances_are_refused(value):
    points = torch.rand(50, 3)
    points[7, 1] = value
    with pytest.raises(PandaError, match="some of these points have no distances, since their values are not numbers"):
        list(greedy_coreset(points, 20, 0))
