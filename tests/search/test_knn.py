import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from panda_lightning import KNNIndex, PandaError
from panda_lightning.search import knn

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def plain(bank: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances in float64, one query after the other."""
    b, q = bank.double().cpu().numpy(), queries.double().cpu().numpy()
    all_distances = np.array([((b - row) ** 2).sum(axis=1) for row in q])
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_distances, order, axis=1), order


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize(("size", "dim", "k"), [(1, 3, 1), (5, 4, 5), (300, 17, 2), (2000, 64, 50)])
def test_distances_are_numpys(backend, size, dim, k, device):
    torch.manual_seed(size)
    bank, queries = torch.randn(size, dim, device=device), torch.randn(23, dim, device=device)
    distances, rows = KNNIndex(backend).fit(bank).search(queries, k)
    expected, order = plain(bank, queries, k)
    np.testing.assert_allclose(distances.cpu(), expected, rtol=2e-6)
    assert (rows.cpu().numpy() == order).mean() > 0.99  # equal distances may change places


@pytest.mark.parametrize("device", DEVICES)
def test_groups_of_a_large_bank_lose_no_neighbour(device):
    torch.manual_seed(0)
    size = KNNIndex.GROUP**2 * 11 + 5  # the last group is not full
    bank = torch.randn(size, 3, device=device)
    bank[100:110] = bank[100]  # neighbours within one group
    queries = torch.cat([bank[100:101], bank[-3:], torch.randn(20, 3, device=device)])
    distances, rows = KNNIndex("torch").fit(bank).search(queries, 3)
    expected, order = plain(bank, queries, 3)
    np.testing.assert_allclose(distances.cpu(), expected, rtol=2e-6, atol=1e-12)
    assert (rows.cpu().numpy()[4:] == order[4:]).mean() > 0.95
    assert int(rows.max()) < size


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_digits_survive_features_far_from_the_origin(backend):
    torch.manual_seed(0)
    far = torch.linspace(-200, 200, 32)  # |b|^2 is 1e8 times the distances
    bank = torch.randn(500, 32) * 1e-2 + far
    queries = torch.cat([bank[:10], torch.randn(20, 32) * 1e-2 + far])
    distances, _ = KNNIndex(backend).fit(bank).search(queries, 3)
    assert distances[:10, 0].tolist() == [0.0] * 10  # a row finds itself at distance exactly zero
    # the bank's own float32 spacing at 200 is 1.5e-5, some 1e-3 of a coordinate's difference
    np.testing.assert_allclose(distances, plain(bank, queries, 3)[0], rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_chunks_change_nothing(backend):
    torch.manual_seed(0)
    bank, queries = torch.randn(4000, 48), torch.randn(200, 48)
    whole = KNNIndex(backend, memory_mb=10_000).fit(bank).search(queries, 4)
    tiny = KNNIndex(backend, memory_mb=0).fit(bank).search(queries, 4)
    torch.testing.assert_close(whole[0], tiny[0], rtol=1e-6, atol=0)
    assert torch.equal(whole[1], tiny[1])


def clusters(count: int, size: int, dim: int, far: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank of clusters around places far from each other, and the places: squared distances 1, 1.1, 1.2, ..."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(count, dim, generator=generator).sign() * far
    directions = torch.nn.functional.normalize(torch.randn(count, size, dim, generator=generator), dim=2)
    return (places[:, None] + directions * (1 + 0.1 * torch.arange(size)).sqrt()[:, None]).flatten(0, 1), places


def test_autocast_around_the_search_changes_nothing():
    bank, queries = clusters(20, 100, dim=32, far=30)  # half-precision products are wrong by more than 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances, rows = KNNIndex("torch").fit(bank).search(queries, 2)
    expected, order = plain(bank, queries, 2)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_neighbours_that_rounding_puts_out_of_order_are_found_among_more_candidates(backend):
    bank, queries = clusters(40, 9, dim=32, far=1000)  # float32 products are wrong by about 5, distances differ by 0.1
    distances, rows = KNNIndex(backend).fit(bank).search(queries, 1)
    expected, order = plain(bank, queries, 1)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-3)


@pytest.mark.parametrize("before", ["highest", "high"])
def test_a_search_multiplies_at_highest_precision_and_leaves_the_setting_as_it_was(before):
    class Index(KNNIndex):
        def _candidates(self, queries, count, group):
            seen.append(torch.get_float32_matmul_precision())
            if count == 5:
                raise MemoryError
            return super()._candidates(queries, count, group)

    seen: list[str] = []
    torch.set_float32_matmul_precision(before)
    try:
        Index("torch").fit(torch.randn(50, 3)).search(torch.randn(4, 3), 2)
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(MemoryError):
            Index("torch").fit(torch.randn(5, 3)).search(torch.randn(4, 3), 2)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest", "highest"]


class Watched(KNNIndex):
    """Writes down how many queries are taken at a time, and how many candidates each has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.chunks: list[int] = []
        self.blocks: list[tuple[int, int]] = []

    def _candidates(self, queries, count, group):
        self.chunks.append(len(queries))
        return super()._candidates(queries, count, group)

    def _distances(self, queries, near):
        self.blocks.append(tuple(near.shape))
        return super()._distances(queries, near)


class Fours(Watched):
    GROUP = 4


@pytest.mark.parametrize(("size", "candidates"), [(175, 11), (176, 44), (177, 44)])
def test_a_bank_is_searched_by_groups_where_they_are_a_small_part_of_it(size, candidates):
    torch.manual_seed(0)
    bank, queries = torch.randn(size, 5), torch.randn(60, 5)
    index = Fours("torch").fit(bank)
    distances, rows = index.search(queries, 3)
    assert {count for _, count in index.blocks} == {candidates}  # 3 + 8 rows, or as many groups, a quarter of all
    expected, order = plain(bank, queries, 3)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_what_fills_up_the_last_group_is_nobodys_neighbour():
    bank = torch.nn.functional.normalize(torch.randn(177, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    bank[-1] *= 0.5
    middle = bank.mean(dim=0).expand(3, 5)  # to which the last row is nearest, and nothing else is near
    distances, rows = Fours("torch").fit(bank).search(middle, 2)
    expected, order = plain(bank, middle, 2)
    assert order[0, 0] == 176
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


@pytest.mark.parametrize(("backend", "products"), [("torch", 2 * 20_000), ("faiss", 0)])
def test_a_chunk_takes_the_memory_it_may(backend, products):
    """Differences and, in torch, products are there twice: before and after they are put together or squared."""
    bank, queries = torch.randn(20_000, 32), torch.randn(200, 32)
    for memory_mb in (3, 0):
        index = Watched(backend, memory_mb).fit(bank)
        index.search(queries, 120)
        chunk = memory_mb * 2**20 // (4 * (products + 2 * 128 * 32)) or 1
        assert index.chunks[:-1] == [chunk] * (199 // chunk)
    assert KNNIndex().memory_mb == 512


@pytest.mark.parametrize(("kind", "count", "dim", "candidates"), [(Watched, 1000, 200, 11), (Fours, 3, 24_000, 44)])
def test_differences_on_a_cpu_are_taken_a_million_at_a_time(kind, count, dim, candidates):
    index = kind("torch").fit(torch.randn(176, dim))
    index.search(torch.randn(count, dim), 3)
    block = 2**20 // (candidates * dim) or 1
    assert set(index.blocks[:-1]) == {(block, candidates)}


@pytest.mark.parametrize(
    ("backend", "dim", "used"), [("auto", 128, False), ("auto", 129, True), ("torch", 129, False), ("faiss", 3, True)]
)
def test_faiss_serves_wide_features_on_a_cpu_where_nothing_is_chosen(monkeypatch, backend, dim, used):
    monkeypatch.setattr(knn, "find_spec", lambda name: name == "faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)  # which fails at its import
    index = KNNIndex(backend).fit(torch.randn(5, dim))
    with pytest.raises(ImportError) if used else nullcontext():
        index.search(torch.randn(2, dim), 1)


def test_a_process_takes_256_mib_of_a_gpu_for_faiss_once(monkeypatch):
    class Resources:
        def setTempMemory(self, size):  # noqa: N802
            taken.append(size)

    taken: list[int] = []
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(StandardGpuResources=Resources))
    knn._gpu_resources.cache_clear()
    assert isinstance(knn._gpu_resources(), Resources)
    assert knn._gpu_resources() is knn._gpu_resources()
    assert taken == [256 * 2**20]
    knn._gpu_resources.cache_clear()


def test_half_precision_features_are_searched_in_float32():
    bank = torch.randn(50, 8).bfloat16()
    distances, _ = KNNIndex().fit(bank).search(bank[:4], 2)
    assert distances.dtype == torch.float32
    assert distances[:, 0].tolist() == [0.0] * 4


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("size", [5, 4096 * 10])
def test_no_queries_give_no_rows(backend, size):
    distances, rows = KNNIndex(backend).fit(torch.randn(size, 3)).search(torch.empty(0, 3).bfloat16(), 2)
    assert distances.shape == rows.shape == (0, 2)
    assert (distances.dtype, rows.dtype) == (torch.float32, torch.long)


def test_a_new_index_is_empty_and_cannot_be_searched():
    assert len(KNNIndex()) == 0
    with pytest.raises(AssertionError, match="fit comes before search"):
        KNNIndex().search(torch.randn(2, 3), 1)


@pytest.mark.parametrize("k", [0, 6])
def test_k_must_fit_the_bank(k):
    with pytest.raises(PandaError, match=f"k={k} neighbours .* bank of 5 normal images: choose 1 to 5"):
        KNNIndex().fit(torch.randn(5, 3)).search(torch.randn(2, 3), k)


def test_an_empty_bank_is_refused():
    with pytest.raises(PandaError, match=r"\(0, 3\)"):
        KNNIndex().fit(torch.empty(0, 3))


def test_without_faiss_auto_takes_torch_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(knn, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "faiss", None)
    knn._say_once.cache_clear()
    with caplog.at_level("INFO"):
        distances, _ = KNNIndex().fit(torch.eye(200)).search(torch.eye(200), 1)
    assert distances.flatten().tolist() == [0.0] * 200
    assert "faiss is not installed" in caplog.text
    with pytest.raises(PandaError, match="faiss is not installed: install it"):
        KNNIndex("faiss").fit(torch.eye(3))
