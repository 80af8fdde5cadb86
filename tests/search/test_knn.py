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
    bank = torch.randn(500, 32) * 1e-2 + 100  # |b|^2 is 3e9 times the distances
    queries = torch.cat([bank[:10], torch.randn(20, 32) * 1e-2 + 100])
    distances, _ = KNNIndex(backend).fit(bank).search(queries, 3)
    assert distances[:10, 0].tolist() == [0.0] * 10  # a row finds itself at distance exactly zero
    # the bank's own float32 spacing at 100 is 8e-6, some 1e-3 of a coordinate's difference
    np.testing.assert_allclose(distances, plain(bank, queries, 3)[0], rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_chunks_change_nothing(backend):
    torch.manual_seed(0)
    bank, queries = torch.randn(4000, 48), torch.randn(200, 48)
    whole = KNNIndex(backend, memory_mb=10_000).fit(bank).search(queries, 4)
    tiny = KNNIndex(backend, memory_mb=0).fit(bank).search(queries, 4)
    torch.testing.assert_close(whole[0], tiny[0], rtol=1e-6, atol=0)
    assert torch.equal(whole[1], tiny[1])


def test_autocast_around_the_search_changes_nothing():
    torch.manual_seed(0)
    index, queries = KNNIndex("torch").fit(torch.randn(3000, 64)), torch.randn(50, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = index.search(queries, 2)
    assert torch.equal(half[0], index.search(queries, 2)[0])


def test_half_precision_features_are_searched_in_float32():
    bank = torch.randn(50, 8).bfloat16()
    distances, _ = KNNIndex().fit(bank).search(bank[:4], 2)
    assert distances.dtype == torch.float32
    assert distances[:, 0].tolist() == [0.0] * 4


def test_no_queries_give_no_rows():
    distances, rows = KNNIndex().fit(torch.randn(5, 3)).search(torch.empty(0, 3), 2)
    assert distances.shape == rows.shape == (0, 2)


@pytest.mark.parametrize("k", [0, 6])
def test_k_must_fit_the_bank(k):
    with pytest.raises(PandaError, match=f"k={k} neighbours .* bank of 5 normal images: choose 1 to 5"):
        KNNIndex().fit(torch.randn(5, 3)).search(torch.randn(2, 3), k)


def test_an_empty_bank_is_refused():
    with pytest.raises(PandaError, match=r"\(0, 3\)"):
        KNNIndex().fit(torch.empty(0, 3))


def test_without_faiss_auto_takes_torch_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(knn, "find_spec", lambda name: None)
    knn._say_once.cache_clear()
    with caplog.at_level("INFO"):
        distances, _ = KNNIndex("auto").fit(torch.eye(200)).search(torch.eye(200), 1)
    assert distances.flatten().tolist() == [0.0] * 200
    assert "faiss is not installed" in caplog.text
    with pytest.raises(PandaError, match="faiss is not installed: install it"):
        KNNIndex("faiss").fit(torch.eye(3))
