import operator
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from panda_lightning import KNNIndex, PandaError
from panda_lightning.search import knn
from panda_lightning.search.knn import full_float32

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


def check(bank: torch.Tensor, queries: torch.Tensor, k: int, backend: str) -> None:
    """The k nearest rows, each once and in order; which ones of those that are equally near does not matter."""
    distances, rows = KNNIndex(backend).fit(bank).search(queries, k)
    b, q = bank.double(), queries.double()
    expected = torch.stack([(b - row).square().sum(dim=1).topk(k, largest=False).values for row in q])
    found = (b[rows.cpu()] - q.unsqueeze(1)).square().sum(dim=2)
    assert all(len(row.unique()) == k for row in rows)
    torch.testing.assert_close(distances.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def apart(spreads: float, dim: int, size: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clusters so many spreads away from each other, and queries near two of them and between."""
    places = torch.tensor([-1.0, 1.0, 2.5]).view(3, 1, 1) * spreads / 2 / dim**0.5
    bank, queries = torch.randn(3, size, dim) + places, torch.randn(3, 7, dim) + places
    queries[2] -= places[2]
    return bank.flatten(0, 1), queries.flatten(0, 1)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("dim", [8, 64, 512])
@pytest.mark.parametrize("spreads", [30, 1e3, 1e4, 1e6])
def test_clusters_may_lie_far_apart(spreads, dim, k, backend):
    torch.manual_seed(0)
    check(*apart(spreads, dim), k, backend)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("spreads", [1, 1e4])
def test_clusters_of_a_bank_that_is_searched_by_groups_may_lie_far_apart(spreads, k, backend):
    torch.manual_seed(0)
    bank, queries = apart(spreads, 8, size=25_000)
    assert len(bank) >= KNNIndex.GROUP**2 * (k + KNNIndex.EXTRA)
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


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("dim", [8, 64, 512])
@pytest.mark.parametrize("make", [outlier, offset, steps, copies, scales])
def test_neighbours_are_found_where_digits_are_lost(make, dim, k, backend):
    torch.manual_seed(0)
    check(*make(dim), k, backend)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_digits_of_other_types_are_kept(dtype, backend):
    torch.manual_seed(0)
    bank, queries = (t.float().to(dtype) for t in apart(3e3, 16))  # in float32, but not less, all differ
    check(bank, queries, 2, backend)


@pytest.mark.parametrize("dim", [8, 512])
def test_what_rounding_may_hide_is_bounded(dim):
    query = torch.nn.functional.normalize(torch.ones(1, dim), dim=1) * 3
    error = 2 * 7 * (3 + 7) * (dim + 8) / 2**24  # |q| = 3, d = 16
    for beyond, hidden in ((16 + 0.99 * error, True), (16 + 1.01 * error, False), (torch.inf, False)):
        found = knn._may_miss(query, torch.tensor([16.0]), torch.tensor([beyond], dtype=torch.float64))
        assert found.tolist() == [hidden]
    assert knn._may_miss(query, torch.zeros(1), torch.zeros(1)).tolist() == [False]  # nothing is nearer than a copy


class Counted(KNNIndex):
    """Writes down how many queries are searched among how many times the candidates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.searches: list[tuple[int, int]] = []

    def _search(self, queries, k, times=1):
        self.searches.append((len(queries), times))
        return super()._search(queries, k, times)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_only_queries_in_doubt_are_searched_again(backend):
    torch.manual_seed(0)
    places = torch.randn(10, 512) * 3
    bank, queries = (places.repeat(n, 1) + torch.randn(10 * n, 512) for n in (300, 20))
    index = Counted(backend).fit(bank)
    index.search(queries, 2)
    assert index.searches == [(200, 1)]  # clusters a few spreads apart leave no doubt
    bank[:12] = 50  # copies, two more than there are candidates at first
    queries = torch.cat([queries, torch.full((1, 512), 49.0), torch.full((1, 512), 50.0)])
    index = Counted(backend).fit(bank)
    distances, rows = index.search(queries, 2)
    assert index.searches == [(202, 1), (1, 8)]
    assert distances[200].tolist() == [512.0] * 2
    assert int(rows[200:].max()) < 12


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
    assert max(sizes.found) <= 2**20


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


# ---- torch's settings: the older one of all matrix products; since 2.9 one of each back end, which follow others

NEWER = hasattr(torch.backends, "fp32_precision")
needs_newer = pytest.mark.skipif(not NEWER, reason="torch >= 2.9")


def put(name: str, value: str) -> None:
    if name == "older":
        torch.set_float32_matmul_precision(value)
    elif name == "mkldnn":
        torch.backends.mkldnn.set_flags(_fp32_precision=value)  # its attribute sets that of all (torch 2.14)
    else:
        parent = operator.attrgetter(name)(torch.backends) if name else torch.backends
        parent.fp32_precision = value


def readings() -> list[str]:
    names = ["", "cudnn", "cudnn.conv", "cuda.matmul", "mkldnn", "mkldnn.matmul", "mkldnn.conv"] if NEWER else []
    found = [(operator.attrgetter(n)(torch.backends) if n else torch.backends).fp32_precision for n in names]
    for older in (torch.get_float32_matmul_precision, lambda: str(torch.backends.cuda.matmul.allow_tf32)):
        try:
            found.append(older())
        except RuntimeError:  # set by both
            found.append("mixed")
    return found


@pytest.fixture
def reset():
    def call():
        put("older", "highest")
        for name in ("", "cudnn", "cuda.matmul", "mkldnn", "mkldnn.matmul") if NEWER else ():
            put(name, "none")

    call()
    yield call
    call()


SETTINGS = [
    [],
    [("older", "high")],
    [("older", "medium")],
    *(
        pytest.param(setting, marks=needs_newer)
        for setting in (
            [("", "tf32")],
            [("", "bf16")],
            [("", "ieee"), ("cuda.matmul", "tf32"), ("mkldnn.matmul", "bf16")],
            [("cuda.matmul", "tf32")],
            [("mkldnn.matmul", "bf16")],
            [("mkldnn", "bf16")],
            [("cudnn", "tf32")],
            [("cudnn", "tf32"), ("cuda.matmul", "tf32")],
            [("", "tf32"), ("cudnn", "tf32"), ("cuda.matmul", "ieee")],
            [("", "bf16"), ("mkldnn", "bf16"), ("mkldnn.matmul", "bf16"), ("cudnn", "ieee"), ("cuda.matmul", "tf32")],
            [("older", "high"), ("cuda.matmul", "ieee"), ("mkldnn.matmul", "bf16")],
            [("", "tf32"), ("older", "medium")],
        )
    ),
]
LATER = [
    ("", "tf32"),
    ("", "bf16"),
    ("mkldnn", "ieee"),
    ("", "ieee"),
    ("cudnn", "tf32"),
    ("", "none"),
    ("cudnn", "none"),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_products_are_of_full_precision_and_every_setting_stays_as_it_was(settings, device, reset):
    def afterwards() -> list[list[str]]:
        """What is read, now and as what settings follow is changed."""
        found = [readings()]
        for setting in LATER if NEWER else ():
            put(*setting)
            found.append(readings())
        return found

    for setting in settings:
        put(*setting)
    expected = afterwards()
    for fails in (False, True):
        reset()
        for setting in settings:
            put(*setting)
        with pytest.raises(MemoryError) if fails else nullcontext(), full_float32(torch.device(device)):
            if NEWER:
                matmul = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
                assert matmul.fp32_precision in ("none", "ieee")
            else:
                assert torch.get_float32_matmul_precision() == "highest"
            if fails:
                raise MemoryError
        assert afterwards() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_torchs_settings_change_no_distance(settings, device, reset):
    bank, queries = (t.to(device) for t in clusters(20, 100, dim=32, far=30))
    for setting in settings:
        put(*setting)
    before = readings()
    distances, rows = KNNIndex("torch").fit(bank).search(queries, 2)
    assert readings() == before
    expected, order = plain(bank, queries, 2)
    np.testing.assert_array_equal(rows.cpu(), order)
    np.testing.assert_allclose(distances.cpu(), expected, rtol=1e-6)


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


@pytest.mark.parametrize(("size", "candidates"), [(175, 11), (176, 44), (177, 45)])
def test_a_bank_is_searched_by_groups_where_they_are_a_small_part_of_it(size, candidates):
    torch.manual_seed(0)
    bank, queries = torch.randn(size, 5), torch.randn(60, 5)
    index = Fours("torch").fit(bank)
    distances, rows = index.search(queries, 3)
    assert {count for _, count in index.blocks} == {
        candidates
    }  # 3 + 8 rows, or as many groups and what is beside groups
    expected, order = plain(bank, queries, 3)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_a_row_beside_all_groups_is_found():
    bank = torch.nn.functional.normalize(torch.randn(177, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    bank[-1] *= 0.5
    middle = bank.mean(dim=0).expand(3, 5)  # to which the last row is nearest
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
    assert set(index.blocks[: count // block]) == {(block, candidates)}


@pytest.mark.parametrize(
    ("backend", "dim", "used"), [("auto", 128, False), ("auto", 129, True), ("torch", 129, False), ("faiss", 3, True)]
)
def test_faiss_serves_wide_features_on_a_cpu_where_nothing_is_chosen(monkeypatch, backend, dim, used):
    monkeypatch.setattr(knn, "find_spec", lambda name: name == "faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)  # which fails at its import
    index = KNNIndex(backend).fit(torch.randn(50, dim))
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


@pytest.mark.parametrize("backend", ["torch", "faiss"])
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


def test_a_new_index_is_empty_and_cannot_be_searched():
    assert len(KNNIndex()) == 0
    with pytest.raises(PandaError, match="there is no bank of normal images yet"):
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
