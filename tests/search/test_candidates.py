"""Bounds on rounding, in products of either type."""

import pytest
import torch

from panda_lightning.runtime.float32 import full_float32
from panda_lightning.search import candidates
from panda_lightning.search.candidates import Products, products_type

LOW = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not candidates._sums_in_float32(torch.device("cpu")), reason="this torch sums products of bfloat16 otherwise"
    ),
)
TYPES = pytest.mark.parametrize("dtype", [torch.float32, LOW])


def squared(queries, bank):
    return torch.stack([(bank.double() - q.double()).square().sum(dim=1) for q in queries])


def spread(dim, scale):
    """A bank around its mean, of rows of all sizes, and queries among them."""
    bank = torch.randn(500, dim) * torch.logspace(-scale, scale, 500)[:, None]
    return bank + 3, torch.randn(40, dim) * torch.logspace(-scale, scale, 40)[:, None] + 3


@TYPES
@pytest.mark.parametrize("dim", [3, 64, 700])
@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize(("k", "group"), [(1, 1), (2, 1), (2, 16), (5, 64), (1, 7)])
def test_all_of_the_k_nearest_are_candidates(k, group, scale, dim, dtype):
    torch.manual_seed(dim)
    bank, queries = spread(dim, scale)
    found = Products(bank, bank.mean(dim=0), dtype).candidates(queries, k, group)
    named = torch.zeros(len(queries), -(-len(bank) // group), dtype=torch.bool)
    named[found.query, found.group] = True
    nearest = squared(queries, bank).topk(k, largest=False).indices
    assert bool(named.gather(1, nearest // group).all())
    assert torch.equal(named.sum(dim=1), found.counts)
    assert bool((found.query[1:] >= found.query[:-1]).all())


@TYPES
@pytest.mark.parametrize("dim", [3, 64, 700])
def test_products_differ_from_distances_by_no_more_than_the_bound(dim, dtype):
    """k-th products that are the distance itself: reach leaves room for the error of either sign."""
    torch.manual_seed(0)
    bank, queries = spread(dim, 1.0)
    products = Products(bank, bank.mean(dim=0), dtype)
    side = products.rows.new_empty(len(queries), products.rows.shape[1])
    with full_float32(bank.device):
        norm, gap = products._write(queries, side, 1)
        side[:, :dim] *= -2
        form = (side @ products.rows.T).double()
    distance = squared(queries, bank)
    wide = (t.double() for t in (norm, gap, products.lost))
    reach = candidates.reach(dim, dtype, distance.T, *wide).T
    assert bool((form <= reach).all())
    room = ((form - distance).abs() / (reach - distance)).amax()
    assert room > (0.02 if dtype == torch.bfloat16 else 0)  # of two errors, by the norms of 500 rows at most


@pytest.mark.parametrize("dtype", [LOW])
@pytest.mark.parametrize("dim", [8, 512])
def test_a_copy_that_all_of_rounding_puts_behind_another_row_is_a_candidate(dim, dtype):
    """Every number of a row is rounded down by the most that there is, and those of its rival not at all."""
    row = torch.full((1, dim), 1 + 2.0**-8 - 2.0**-12)
    rival = torch.ones(1, dim)
    rival[0, 0] = 1 + 0.0625 * dim**0.5
    bank = torch.cat([row, rival, -row, -rival])  # whose mean is 0
    products = Products(bank, torch.zeros(dim), dtype)
    side = products.rows.new_empty(1, products.rows.shape[1])
    products._write(row, side, 1)
    side[:, :dim] *= -2
    form = (side @ products.rows.T)[0]
    assert form[1] < form[0]  # so the product alone would take the rival
    assert 0 in products.candidates(row, 1, 1).group


@pytest.mark.parametrize("dtype", [LOW])
def test_more_groups_are_named_the_less_bfloat16_tells(dtype):
    """Near ties, and clusters far apart, within which it tells nothing."""
    torch.manual_seed(0)
    near, far = torch.randn(400, 32), torch.randn(400, 32)
    far[:200] += 60
    far[200:] -= 60
    for bank, least, most in ((near, 1, 20), (far, 190, 200)):
        counts = [
            Products(bank, bank.mean(0), kind).candidates(bank[:9] + 0.5, 1, 1).counts
            for kind in (dtype, torch.float32)
        ]
        assert least <= int(counts[0].min())
        assert int(counts[0].max()) <= most
        assert int(counts[1].max()) <= 2


def test_bfloat16_is_taken_where_it_is_faster_and_rounds_once(monkeypatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.5}
    clock = [0.0]

    def least(products, group):
        clock[0] += seconds[products.dtype]
        return products

    monkeypatch.setattr(candidates, "_least", least)
    monkeypatch.setattr(candidates.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(candidates, "_sums_in_float32", lambda device: True)
    for faster, expected in ((0.5, torch.bfloat16), (0.9, torch.float32), (2.0, torch.float32)):
        seconds[torch.bfloat16] = faster
        products_type.cache_clear()
        assert products_type("cpu") == expected
    seconds[torch.bfloat16] = 0.1
    monkeypatch.setattr(candidates, "_sums_in_float32", lambda device: False)
    products_type.cache_clear()
    assert products_type("cpu") == torch.float32
    assert products_type("mps") == torch.float32
    products_type.cache_clear()


def test_the_choice_draws_no_number_and_autocast_does_not_change_it(monkeypatch):
    seen = []
    least = candidates._least
    monkeypatch.setattr(
        candidates, "_least", lambda products, group: seen.append(products.dtype) or least(products, group)
    )
    products_type.cache_clear()
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products_type("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert set(seen) <= {torch.float32, torch.bfloat16}
    assert not seen or len(set(seen)) == 2
    products_type.cache_clear()


def test_sums_of_bfloat16_would_be_noticed(monkeypatch):
    assert isinstance(candidates._sums_in_float32(torch.device("cpu")), bool)
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: sum(plain(x, y) for x, y in zip(a.split(64, 1), b.split(64, 0), strict=True)),
    )
    assert not candidates._sums_in_float32(torch.device("cpu"))
