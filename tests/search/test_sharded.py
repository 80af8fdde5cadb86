import numpy as np
import pytest
import torch

from panda_lightning import KNNIndex, PandaError
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
