import re

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from panda_lightning import KNNIndex, PandaError
from panda_lightning.search import candidates, knn

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


LOW = candidates._sums_in_float32(torch.device("cpu"))
KINDS = [
    "torch",
    pytest.param(
        "bfloat16", marks=pytest.mark.skipif(not LOW, reason="this torch sums products of bfloat16 otherwise")
    ),
    "faiss",
]


@pytest.fixture(params=KINDS)
def backend(request, monkeypatch):
    """Every way in which candidates are named, whatever this machine is fast at."""
    dtype = torch.bfloat16 if request.param == "bfloat16" else torch.float32
    monkeypatch.setattr(knn, "products_type", lambda device: dtype)
    return "faiss" if request.param == "faiss" else "torch"


def plain(bank: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances in float64, one query after the other."""
    b, q = bank.double().cpu().numpy(), queries.double().cpu().numpy()
    all_distances = np.array([((b - row) ** 2).sum(axis=1) for row in q])
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_distances, order, axis=1), order


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "dim", "k"), [(1, 3, 1), (5, 4, 5), (300, 17, 2), (2000, 64, 50)])
def test_distances_are_numpys(backend, size, dim, k, device):
    torch.manual_seed(size)
    bank, queries = torch.randn(size, dim, device=device), torch.randn(23, dim, device=device)
    distances, rows = KNNIndex(backend).fit(bank).search(queries, k)
    expected, order = plain(bank, queries, k)
    np.testing.assert_allclose(distances.cpu(), expected, rtol=2e-6)
    assert (rows.cpu().numpy() == order).mean() > 0.99  # equal distances may change places


@pytest.mark.parametrize("device", DEVICES)
def test_groups_of_a_large_bank_lose_no_neighbour(backend, device):
    torch.manual_seed(0)
    size = 64**2 * 11 + 5  # the last group is not full
    bank = torch.randn(size, 3, device=device)
    bank[100:110] = bank[100]  # neighbours within one group
    queries = torch.cat([bank[100:101], bank[-3:], torch.randn(20, 3, device=device)])
    distances, rows = KNNIndex(backend).fit(bank).search(queries, 3)
    expected, order = plain(bank, queries, 3)
    np.testing.assert_allclose(distances.cpu(), expected, rtol=2e-6, atol=1e-12)
    assert (rows.cpu().numpy()[4:] == order[4:]).mean() > 0.95
    assert int(rows.max()) < size


def check(bank: torch.Tensor, queries: torch.Tensor, k: int, backend: str) -> None:
    """The k nearest rows, each once and in order; which ones of those that are equally near does not matter."""
    distances, rows = KNNIndex(backend).fit(bank).search(queries, k)
    b, q = bank.double(), queries.double()
    expected = torch.stack([(b - row).square().sum(dim=1).topk(k, largest=False).values for row in q])
    found = (b[rows.cpu()] - q.unsqueeze(1)).square().sum(dim=2)
    assert all(len(row.unique()) == k for row in rows)
    torch.testing.assert_close(distances.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    whole = (b.float() - q.float().unsqueeze(1)).square().sum(dim=2)  # of equal ones the first come, in any way
    assert torch.equal(rows, torch.sort(whole, dim=1, stable=True).indices[:, :k])
    assert torch.equal(distances, whole.gather(1, rows))


def apart(spreads: float, dim: int, size: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clusters so many spreads away from each other, and queries near two of them and between."""
    places = torch.tensor([-1.0, 1.0, 2.5]).view(3, 1, 1) * spreads / 2 / dim**0.5
    bank, queries = torch.randn(3, size, dim) + places, torch.randn(3, 7, dim) + places
    queries[2] -= places[2]
    return bank.flatten(0, 1), queries.flatten(0, 1)


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("dim", [8, 64, 512])
@pytest.mark.parametrize("spreads", [30, 1e3, 1e4, 1e6])
def test_clusters_may_lie_far_apart(spreads, dim, k, backend):
    torch.manual_seed(0)
    check(*apart(spreads, dim), k, backend)


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("spreads", [1, 1e4])
def test_clusters_of_a_bank_that_is_searched_by_groups_may_lie_far_apart(spreads, k, backend):
    torch.manual_seed(0)
    bank, queries = apart(spreads, 8, size=25_000)
    check(bank, queries, k, backend)


def outlier(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row so far away that it moves the mean away from all others."""
    bank = torch.cat([torch.randn(700, dim), torch.full((1, dim), 1e6)])
    return bank, torch.cat([torch.randn(20, dim), bank[-1:] + 1])


def offset(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """|b|^2 is 1e8 times the distances; some queries are rows."""
    bank = torch.randn(700, dim) * 1e-2 + torch.linspace(-200, 200, dim)
    return bank, torch.cat([bank[:5], torch.randn(20, dim) * 1e-2 + torch.linspace(-200, 200, dim)])


def steps(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32's steps, 1e-3, are a tenth of the spread."""
    rows = torch.randn(720, dim) * 1e-2 + 1e4
    return rows[:700], rows[690:]


def copies(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """More rows are equally near than there are candidates."""
    bank = torch.randn(20, dim).repeat(40, 1) + 300
    return bank, torch.cat([bank[:5], torch.randn(20, dim) + 300, bank[:20] + 1e-3 * torch.randn(20, dim)])


def scales(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A spread of 1e-3 at 1e-3, of 1e3 at 1e3, and all between."""
    rows = torch.randn(750, dim) + 3
    rows *= torch.logspace(-3, 3, 750).unsqueeze(1)
    chosen = torch.randperm(750)
    return rows[chosen[50:]], rows[chosen[:50]]


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("dim", [8, 64, 512])
@pytest.mark.parametrize("make", [outlier, offset, steps, copies, scales])
def test_neighbours_are_found_where_digits_are_lost(make, dim, k, backend):
    torch.manual_seed(0)
    check(*make(dim), k, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_digits_of_other_types_are_kept(dtype, backend):
    torch.manual_seed(0)
    bank, queries = (t.float().to(dtype) for t in apart(3e3, 16))  # in float32, but not less, all differ
    check(bank, queries, 2, backend)


def test_only_queries_in_doubt_are_searched_again(monkeypatch, backend):
    made = []
    products = candidates.Products
    monkeypatch.setattr(knn, "Products", lambda bank, mean, dtype: made.append(dtype) or products(bank, mean, dtype))
    torch.manual_seed(0)
    places = torch.randn(1500, 64) * 3
    bank, queries = (rows + 0.3 * torch.randn(len(rows), 64) for rows in (places.repeat(2, 1), places[-200:]))
    index = KNNIndex(backend).fit(bank)
    index.search(queries, 2)
    first = [] if backend == "faiss" else [knn.products_type("cpu")]
    assert made == first  # the two nearest are much nearer than others
    bank[:900] = 50.0  # copies, more than there are candidates at first
    queries = torch.cat([queries, torch.full((1, 64), 49.0), torch.full((1, 64), 50.0)])
    made.clear()
    index = KNNIndex(backend).fit(bank)
    distances, rows = index.search(queries, 2)
    assert made == (first if first == [torch.float32] else [*first, torch.float32])
    assert distances[200:].tolist() == [[64.0] * 2, [0.0] * 2]
    assert rows[200:].tolist() == [[0, 1], [0, 1]]
    assert index._products is None or index._products.dtype == first[0]
    index.search(queries[200:].repeat(2, 1), 2)
    assert index._products is None or index._products.dtype == torch.float32  # which tells these apart, from now on


class Sizes(TorchFunctionMode):
    """Writes down how many numbers are taken out of a bank at a time."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.index_select:
            self.found.append(out.numel())
        return out


def test_differences_to_all_rows_take_no_more_memory():
    torch.manual_seed(0)
    bank, queries = apart(1e6, 512, size=2000)
    with Sizes() as sizes:
        KNNIndex("torch").fit(bank).search(queries[:2], 1)
    assert sum(sizes.found) > 2 * bank[:2000].numel()
    assert max(n for n in sizes.found if n > 2 * 512) <= 2**18


def test_chunks_change_nothing(backend):
    torch.manual_seed(0)
    bank, queries = torch.randn(4000, 48), torch.randn(200, 48)
    whole = KNNIndex(backend, memory_mb=10_000).fit(bank).search(queries, 4)
    tiny = KNNIndex(backend, memory_mb=0).fit(bank).search(queries, 4)
    assert torch.equal(whole[0], tiny[0])
    assert torch.equal(whole[1], tiny[1])


def test_pieces_of_a_bank_are_searched_alone(backend):
    torch.manual_seed(0)
    bank, queries = torch.randn(6, 500, 700)[:, :, ::7], torch.randn(3, 40, 100)  # not contiguous
    pieces = torch.tensor([[4, 0], [5, 5], [1, 2]])
    found = KNNIndex(backend).fit(bank).nearest_in_each(queries, pieces)
    expected = [plain(bank[some].flatten(0, 1), q, 1)[0][:, 0] for some, q in zip(pieces, queries, strict=True)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=2e-6)


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


def test_neighbours_that_rounding_puts_out_of_order_are_found_among_more_candidates(backend):
    bank, queries = clusters(40, 9, dim=32, far=1000)  # float32 products are wrong by about 5, distances differ by 0.1
    distances, rows = KNNIndex(backend).fit(bank).search(queries, 1)
    expected, order = plain(bank, queries, 1)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "k", "group"), [(1000, 300, 1), (10_000, 300, 2), (200, 1, 8), (10**5, 1, 64), (3, 3, 1)]
)
def test_groups_grow_with_the_bank(monkeypatch, size, k, group):
    """No more rows than make the differences to k groups as long as the choice among them; k groups at least."""
    seen = []
    found = candidates.Products.candidates
    monkeypatch.setattr(
        candidates.Products, "candidates", lambda self, q, k, group: seen.append(group) or found(self, q, k, group)
    )
    torch.manual_seed(0)
    bank, queries = torch.randn(size, 24), torch.randn(5, 24)
    distances, rows = KNNIndex("torch").fit(bank).search(queries, k)
    assert set(seen) == {group}
    expected, order = plain(bank, queries, k)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


@pytest.mark.skipif(not LOW, reason="this torch sums bfloat16 otherwise")
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("apart", [0, 10])
def test_bfloat16_is_tried_on_some_queries_and_left_where_it_tells_too_little(monkeypatch, apart, pieces):
    seen = []
    found = candidates.Products.candidates
    monkeypatch.setattr(
        candidates.Products,
        "candidates",
        lambda self, q, k, group: seen.append((self.dtype, len(q))) or found(self, q, k, group),
    )
    monkeypatch.setattr(knn, "products_type", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    bank = torch.randn(2000, 60) + apart * torch.tensor([1, -1]).repeat(1000)[:, None]
    queries = bank[:1500] + 0.2 * torch.randn(1500, 60)
    index = KNNIndex("torch").fit(bank.view(4, 500, 60) if pieces else bank)
    if pieces:
        rows = index.nearest_in_each(queries[None], torch.arange(4)[None])[0]
        expected = plain(bank, queries, 1)[0][:, 0]
    else:
        rows, expected = index.search(queries, 2)[1], plain(bank, queries, 2)[1]
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    kind = torch.float32 if apart else torch.bfloat16
    wanted = [(torch.bfloat16, 32), (kind, 1024), (kind, 444)]
    again = [one for one in seen if one not in wanted]
    assert [one for one in seen if one in wanted] == wanted
    assert all(dtype == torch.float32 for dtype, _ in again)
    assert index._products.dtype == kind


def test_a_row_of_the_last_group_which_is_not_full_is_found(backend):
    bank = torch.nn.functional.normalize(torch.randn(4097, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    bank[-1] *= 0.5
    middle = bank.mean(dim=0).expand(3, 5)  # to which the last row is nearest
    distances, rows = KNNIndex(backend).fit(bank).search(middle, 2)
    expected, order = plain(bank, middle, 2)
    assert order[0, 0] == 4096
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_a_chunk_takes_the_memory_it_may(monkeypatch):
    """Of a bank of 20,000 rows in groups of 8: least products in float32, three times, a mask and its copy."""
    seen = []
    found = candidates.Products.candidates
    monkeypatch.setattr(
        candidates.Products, "candidates", lambda self, q, k, g: seen.append((len(q), g)) or found(self, q, k, g)
    )
    monkeypatch.setattr(knn, "products_type", lambda device: torch.float32)
    bank, queries = torch.randn(20_000, 32), torch.randn(200, 32)
    for memory_mb in (1, 0):
        seen.clear()
        KNNIndex("torch", memory_mb).fit(bank).search(queries, 30)
        chunk = memory_mb * 2**20 // (2500 * 14) or 1
        assert seen[:-1] == [(chunk, 8)] * (199 // chunk)
    assert KNNIndex().memory_mb == 512


def test_half_precision_features_are_searched_in_float32():
    bank = torch.randn(50, 8).bfloat16()
    distances, _ = KNNIndex().fit(bank).search(bank[:4], 2)
    assert distances.dtype == torch.float32
    assert distances[:, 0].tolist() == [0.0] * 4


@pytest.mark.parametrize("size", [5, 4096 * 10])
def test_no_queries_give_no_rows(backend, size):
    distances, rows = KNNIndex(backend).fit(torch.randn(size, 3)).search(torch.empty(0, 3).bfloat16(), 2)
    assert distances.shape == rows.shape == (0, 2)
    assert (distances.dtype, rows.dtype) == (torch.float32, torch.long)


@pytest.mark.parametrize("count", [3, 30])  # faiss takes few by differences
def test_a_query_that_is_no_number_has_no_distance_and_leaves_the_others_alone(backend, count):
    torch.manual_seed(0)
    bank, queries = torch.randn(500, 16), torch.randn(count, 16)
    expected = plain(bank, queries[1:], 2)
    queries[0, 3] = torch.nan
    distances, rows = KNNIndex(backend).fit(bank).search(queries, 2)
    assert bool(distances[0].isnan().all())
    assert int(rows.min()) >= 0
    np.testing.assert_allclose(distances[1:], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(rows[1:], expected[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_spoils_no_backend_alone(backend, value):
    torch.manual_seed(0)
    bank, queries = torch.randn(300, 16), torch.randn(4, 16)
    bank[7, 2] = value
    distances, rows = KNNIndex(backend).fit(bank).search(queries, 2)
    with_torch = KNNIndex("torch").fit(bank).search(queries, 2)
    assert torch.equal(rows, with_torch[1])
    assert torch.equal(distances.nan_to_num(), with_torch[0].nan_to_num())


def test_a_bank_may_have_a_gradient():
    bank = torch.randn(20, 3, requires_grad=True)
    assert KNNIndex().fit(bank).search(bank[:2], 1)[1].flatten().tolist() == [0, 1]


def test_a_new_index_is_empty_and_cannot_be_searched():
    assert len(KNNIndex()) == 0
    with pytest.raises(PandaError, match="there is no bank of normal images yet"):
        KNNIndex().search(torch.randn(2, 3), 1)


@pytest.mark.parametrize("k", [0, 6])
def test_k_must_fit_the_bank(k):
    with pytest.raises(PandaError, match=f"k={k} neighbours .* bank of 5 normal images: choose 1 to 5"):
        KNNIndex().fit(torch.randn(5, 3)).search(torch.randn(2, 3), k)


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (2, 0, 3), (3,), (3, 0)])
def test_an_empty_bank_is_refused(shape):
    with pytest.raises(PandaError, match=re.escape(str(shape))):
        KNNIndex().fit(torch.empty(shape))
