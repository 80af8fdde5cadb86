import numpy as np
import pytest
import torch

from panda_lightning import KNNIndex, PandaError
from panda_lightning.search import sharded
from panda_lightning.search.sharded import ShardedIndex
from tests.search.test_knn import plain

GENERATOR = torch.Generator().manual_seed(0)
BANK = torch.randn(50, 6, generator=GENERATOR) + torch.arange(6)
QUERIES = torch.randn(9, 6, generator=GENERATOR) + torch.arange(6)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize(("world", "size", "k"), [(2, 50, 3), (3, 50, 20), (3, 4, 4), (3, 2, 2)])
def test_parts_of_a_bank_on_each_process_give_the_neighbours_of_all(as_processes, backend, world, size, k):
    def search(rank):
        """Process 0 has no queries, 1 has four in two batches, 2 has five."""
        index = ShardedIndex(backend).fit(BANK[:size][rank::world])
        batches = [[], QUERIES[:4].split([3, 1]), QUERIES[4:].split(5)][rank]
        found = [index.search(batch, k) for batch in batches]
        index.serve()
        return len(index), found

    found = as_processes(world, search)
    assert [size_ for size_, _ in found] == [size] * world
    distances, rows = (torch.cat(column) for column in zip(*[f for _, some in found for f in some], strict=True))
    expected, order = plain(BANK[:size], QUERIES[: len(rows)], k)
    assert len(rows) == (4 if world == 2 else 9)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


@pytest.mark.parametrize(("world", "asked"), [(2, [(9, 2), (2, 5)]), (3, [(0, 1), (5, 4), (9, 1)])])
def test_a_round_sends_no_more_rows_than_it_may_and_gives_each_process_what_it_asked_for(
    as_processes, monkeypatch, world, asked
):
    sent = []
    of_each = sharded.of_each
    monkeypatch.setattr(sharded, "of_each", lambda t: sent.append(tuple(t.shape)) or of_each(t))
    monkeypatch.setattr(ShardedIndex, "ROUND", 2)

    def search(rank):
        count, k = asked[rank]
        index = ShardedIndex().fit(BANK[rank::world])
        found = index.search(QUERIES[:count], k)
        index.serve()
        return found

    for (count, k), (distances, rows) in zip(asked, as_processes(world, search), strict=True):
        expected, order = plain(BANK, QUERIES[:9], k)
        np.testing.assert_array_equal(rows, order[:count])
        np.testing.assert_allclose(distances, expected[:count], rtol=1e-5)
    queries = [shape for shape in sent if shape[1:] == (6,)]
    assert {rows for rows, _ in queries} == {1, 2}
    assert len(queries) == 5 * world  # nine queries take five rounds of all processes


def test_processes_search_for_real_queries_alone(as_processes, monkeypatch):
    """What fills a process's few queries up to another's many may lie far away, where search is slow."""
    seen = []
    search_ = ShardedIndex._search
    monkeypatch.setattr(ShardedIndex, "_search", lambda self, q, k, *more: seen.append(q) or search_(self, q, k, *more))

    def search(rank):
        index = ShardedIndex().fit(BANK[rank::2])
        return index.search(QUERIES[: 3 if rank else 8], 2)

    as_processes(2, search)
    assert {len(queries) for queries in seen} == {8 + 3}
    assert all(bool((queries.abs().sum(dim=1) > 0).all()) for queries in seen)


def test_parts_without_rows_alone_are_no_bank(as_processes):
    def fit(rank):
        with pytest.raises(PandaError, match=r"a bank of shape \(0, 6\) cannot be searched"):
            ShardedIndex().fit(BANK[:0])

    as_processes(2, fit)
    fit(0)


def test_one_process_searches_as_without_parts():
    whole, parts = KNNIndex().fit(BANK), ShardedIndex().fit(BANK)
    for ours, theirs in zip(parts.search(QUERIES, 5), whole.search(QUERIES, 5), strict=True):
        assert torch.equal(ours, theirs)
    parts.serve()
    assert len(parts) == 50


def test_parts_subtract_the_mean_of_the_whole_bank(as_processes):
    """One part lies far from the other: what is subtracted from both must be their common mean, not that of a part."""
    bank = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    bank[1::2] += 1000
    queries = bank[:20] + 0.1
    expected, _ = KNNIndex("torch").fit(bank).search(queries, 5)

    def search(rank):
        index = ShardedIndex("torch").fit(bank[rank::2])
        return index._mean, index.search(queries, 5)[0]

    for mean, distance in as_processes(2, search):
        torch.testing.assert_close(mean.double(), bank.double().mean(dim=0), rtol=1e-6, atol=0)
        torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-4)


def test_features_of_half_precision_are_searched_in_float32(as_processes):
    bank = torch.randn(602, 6, generator=torch.Generator().manual_seed(0)).bfloat16()  # which has no 301
    queries = QUERIES.bfloat16()

    def search(rank):
        index = ShardedIndex().fit(bank[rank::2])
        assert len(index) == 602
        return index.search(queries[rank::2], 2)

    expected, order = plain(bank, queries, 2)
    for rank, (distances, rows) in enumerate(as_processes(2, search)):
        assert (distances.dtype, rows.dtype) == (torch.float32, torch.long)
        np.testing.assert_array_equal(rows, order[rank::2])
        np.testing.assert_allclose(distances, expected[rank::2], rtol=1e-5)


def test_no_queries_give_no_rows_and_need_no_other_process(as_processes):
    def search(rank):
        return ShardedIndex().fit(BANK[rank::2]).search(QUERIES[:0], 3)

    for distances, rows in as_processes(2, search):
        assert distances.shape == rows.shape == (0, 3)
        assert (distances.dtype, rows.dtype) == (torch.float32, torch.long)


def test_k_must_fit_the_whole_bank(as_processes):
    def search(rank):
        with pytest.raises(PandaError, match="k=51 neighbours .* bank of 50 normal images: choose 1 to 50"):
            ShardedIndex().fit(BANK[rank::2]).search(QUERIES, 51)

    as_processes(2, search)
