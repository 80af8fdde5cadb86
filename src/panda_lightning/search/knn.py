"""Exact nearest neighbours: the feature bank and its search."""

import math
from typing import Literal, Self

import torch
from torch import Tensor

from panda_lightning.arguments import Checked, Number
from panda_lightning.runtime.float32 import full_float32
from panda_lightning.search import with_faiss
from panda_lightning.search.candidates import NONE, Candidates, Products, packed, products_type, total, unpacked
from panda_lightning.types import PandaError

Backend = Literal["auto", "torch", "faiss"]
MANY = 64  # groups of a query that are looked at together with those of others
DEAR = 48  # a difference takes so many times as long as a product: where it is more, bfloat16 saves nothing
TRIAL = 32  # queries that show what bfloat16 is worth


class KNNIndex(Checked):
    """Exact k-nearest-neighbour search by squared Euclidean distance, in float32 for any type of features.

    The distances returned are those of the k nearest rows, up to float32 rounding of a sum of squared differences: a
    relative error of at most (D + 2) 2^-24, usually about 1e-7. Rows at the same distance are returned in their order.

    The matrix-product form |q|^2 - 2 q.b + |b|^2 is fast but loses digits by cancellation, so it only selects
    candidates: all rows that may be among the k nearest, according to a bound on its rounding error. The distances
    returned are computed from differences, so distances and rows do not depend on how candidates were selected: in
    float32, in bfloat16, which is faster on processors and GPUs that support it (``products_type``), or by faiss.
    Queries for which bfloat16 selects too many candidates are searched again in float32. Candidates are groups of rows;
    the product keeps only the smallest value of each group.

    Args:
        backend: torch, faiss, or auto, which is torch; pieces of a bank are searched by torch.
        memory_mb: Approximate memory that one chunk of a search may use, in MiB; a chunk has at least one query.
    """

    EXTRA = 8  # candidates of faiss beyond k, so that seldom more are needed
    GROUP = 64  # rows of a group, at most

    def __init__(self, backend: Backend = "auto", memory_mb: Number = 512) -> None:
        self.backend = backend
        self.memory_mb = memory_mb
        self._rows = 0

    def empty(self) -> Self:
        """Another index of this kind, for a bank that each process has all of."""
        return type(self)(self.backend, self.memory_mb)

    def fit(self, bank: Tensor) -> Self:
        """Take the bank, on the device where it lies.

        Args:
            bank: (N, D) features, or (N, P, D) for ``nearest_in_each``. The index goes on reading them, so they must
                not be written to.
        """
        bank = bank.detach()
        if bank.ndim not in (2, 3) or not bank.numel():
            raise PandaError(f"a bank of shape {tuple(bank.shape)} cannot be searched: give (N, D) with N > 0.")
        return self._take(bank, total(bank) / math.prod(bank.shape[:-1]))

    def _take(self, bank: Tensor, mean: Tensor) -> Self:
        self._given, self._mean = bank, mean.float().to(bank.device)
        self._rows = math.prod(bank.shape[:-1])
        # numbers in a block of differences: those of a CPU stay in its caches
        self._block = 2**18 if bank.device.type == "cpu" else int(self.memory_mb * 2**17)
        # faiss finds nothing where a number is not finite
        by_faiss = with_faiss.is_used(self.backend) and bank.ndim == 2 and bool(self._mean.isfinite().all())
        self._faiss = self._given.float() - self._mean if by_faiss else None
        self._products = self._made(products_type(bank.device.type)) if self._faiss is None else None
        self._tried = False
        return self

    def _made(self, dtype: torch.dtype) -> Products:
        return Products(self._given, self._mean, dtype)

    def __len__(self) -> int:
        return self._rows

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows of the bank.

        Args:
            queries: (B, D), on the bank's device.
            k: How many neighbours, at most the size of the bank.

        Returns:
            Squared L2 distances (B, k), ascending, and the rows' numbers (B, k).

        Raises:
            PandaError: If k does not fit the bank, or there is none.
        """
        if not self._rows:
            raise PandaError(
                "there is no bank of normal images yet: run a test or a fit with validation, which make it."
            )
        self._check(k)
        return self._search(queries, k)

    def nearest_in_each(self, queries: Tensor, pieces: Tensor) -> Tensor:
        """Squared distances (B, P) of queries (B, P, D), each to the nearest row of its own n pieces (B, n) of a bank.

        Pieces are numbers in the first dimension of a bank (N, P, D).
        """
        pairs = zip(queries, pieces, strict=True)
        return torch.stack([self._search(some, 1, among)[0][:, 0] for some, among in pairs])

    def _search(self, queries: Tensor, k: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``search``, or with numbers of pieces (n,) among their rows alone, which are then counted from 0."""
        if not len(queries):
            return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.long)
        queries = queries.detach().float()
        with full_float32(self._given.device):
            way = self._by_faiss if self._products is None else self._by_products
            keys, all_found = way(queries, k, among)
            if not all_found:
                again = keys[:, 0].eq(NONE).nonzero().flatten()
                exact = self._products
                if exact is None or exact.dtype != torch.float32 or among is not None:
                    exact = Products(self._given if among is None else self._given[among], self._mean, torch.float32)
                keys[again] = torch.cat(
                    [
                        self._of_chunk(some, k, exact, among)[0]
                        for some in torch.split(queries[again], self._chunk(exact, k))
                    ]
                )
        return unpacked(keys)

    def _by_products(self, queries: Tensor, k: int, among: Tensor | None) -> tuple[Tensor, bool]:
        """The k nearest, packed (B, k), and whether they are all there; NONE where bfloat16 leaves too many."""
        used, found, all_found = self._products, [], True
        assert used is not None
        products = used if among is None else used.of(among)
        while len(queries):
            chunk = self._chunk(products, k)
            keys, named, whole = self._of_chunk(queries[:chunk], k, products, among)
            found.append(keys)
            queries, all_found, self._tried = queries[chunk:], all_found and whole, True
            if used.dtype != torch.float32 and DEAR * named > len(keys) * products.count:
                used = self._products = self._made(torch.float32)  # bfloat16 tells too few rows of this bank apart
                products = used if among is None else used.of(among)
        return torch.cat(found), all_found

    def _of_chunk(self, queries: Tensor, k: int, products: Products, among: Tensor | None) -> tuple[Tensor, int, bool]:
        """The same of some queries, between the two how many candidates were named."""
        group = self._group(products, k)
        groups, few = -(-products.count // group), max(2 * k, MANY)
        most = groups if products.dtype == torch.float32 else max(few, groups // DEAR)
        near = products.candidates(queries, k, group)
        named, largest = group * len(near.query), int(near.counts.max())  # for these two a GPU is waited for
        if largest <= few:
            return self._chosen(queries, near, largest, k, among), named, True
        keys, light = torch.full((len(queries), k), NONE, device=queries.device), near.counts <= few
        if bool(light.any()):
            keys[light] = self._chosen(queries[light], near.of(light), few, k, among)
        for one in (~light & (near.counts <= most)).nonzero():
            own = near.of_one(int(one))
            keys[one] = self._chosen(queries[one], own, len(own.group), k, among)
        return keys, named, largest <= most

    def _group(self, products: Products, k: int) -> int:
        """Rows of a group: so many that differences to those of k take about as long as the choice among groups."""
        balance = round(math.log2(math.sqrt(4 * products.count / (k * len(self._mean)))))
        return int(min(self.GROUP, 2 ** max(0, balance), products.count // k))

    def _chunk(self, products: Products, k: int) -> int:
        """How many queries are searched at a time: least products of groups are there three times, and as a mask."""
        on_cpu, size = self._given.device.type == "cpu", products.dtype.itemsize
        row_bytes = -(-products.count // self._group(products, k)) * (3 * size + 2)
        most = int(self.memory_mb * 2**20) // (row_bytes if on_cpu else row_bytes + products.count * size)
        untried = products.dtype != torch.float32 and not self._tried
        return max(1, min(most, TRIAL if untried else 1024 if on_cpu else most))

    def _chosen(self, queries: Tensor, near: Candidates, largest: int, k: int, among: Tensor | None) -> Tensor:
        """The k nearest rows of each query's candidates, at most ``largest`` groups, packed, ascending (B, k)."""
        inside, found = torch.arange(near.size, device=queries.device), []
        step = max(1, self._block // (near.size * queries.shape[1]))
        for query, place in zip(torch.split(near.query, step), torch.split(near.group, step), strict=True):
            row = place.unsqueeze(1) * near.size + inside
            distance = self._distances(queries.index_select(0, query), row.clamp(max=near.total - 1), among)
            keys = torch.where(row < near.total, packed(distance, row), NONE)
            found.append(keys.topk(min(k, near.size), largest=False, sorted=False).values)
        keys, first = torch.cat(found), near.counts.cumsum(0) - near.counts
        slot = torch.arange(len(keys), device=keys.device) - first[near.query]
        all_keys = keys.new_full((len(queries), largest, keys.shape[1]), NONE)
        all_keys[near.query, slot] = keys
        return all_keys.flatten(1).topk(k, largest=False).values

    def _distances(self, queries: Tensor, rows: Tensor, among: Tensor | None = None) -> Tensor:
        """Squared distances of each query (B, D) to rows (B, count), of the features as they were given."""
        if self._given.ndim == 2:
            taken = self._given.index_select(0, rows.flatten())
        else:
            size = self._given.shape[1]
            piece = rows // size
            taken = self._given[piece if among is None else among[piece], rows % size]
        return taken.float().view(*rows.shape, -1).sub_(queries.unsqueeze(1)).square_().sum(dim=2)

    def _by_faiss(self, queries: Tensor, k: int, among: Tensor | None) -> tuple[Tensor, bool]:
        """The k nearest, packed (B, k), and whether they are all there; NONE where candidates may lack one."""
        assert self._faiss is not None
        count = min(k + self.EXTRA, self._rows, with_faiss.most(self._faiss))
        keys = torch.full((len(queries), k), NONE, device=queries.device)
        one = count * queries.shape[1]  # numbers in the differences of a query
        chunks = (torch.split(t, max(1, int(self.memory_mb * 2**17) // one)) for t in (queries, keys))
        for some, into in zip(*chunks, strict=True) if k <= count else ():
            near, sure = with_faiss.candidates(some - self._mean, self._faiss, k, count)
            pieces = (torch.split(t, max(1, self._block // one)) for t in (some, near))
            exact = torch.cat([self._distances(*piece) for piece in zip(*pieces, strict=True)])
            into.copy_(torch.where(sure.unsqueeze(1), packed(exact, near).topk(k, largest=False).values, NONE))
        return keys, not bool((keys == NONE).any())

    # ---- a bank of which each process may hold a part: see search/sharded.py; here each has all of it

    def own(self, bank: Tensor) -> Tensor:
        """The rows of a whole bank (N, ...) that this process is to hold."""
        return bank

    def rows(self, count: int) -> Tensor:
        """The numbers in the whole bank of the ``count`` rows that this process holds."""
        return torch.arange(count)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the whole bank of a value (N, ...) for each row that this process holds."""
        return values.mean(dim=0)

    def whole(self, bank: Tensor) -> Tensor:
        """The whole bank, on the CPU, from the rows that this process holds; every process must call it."""
        return bank.cpu()

    def serve(self) -> None:
        """Search for other processes until none has queries; every process calls it when it has no more."""

    def _check(self, k: int) -> None:
        if not 1 <= k <= len(self):
            raise PandaError(
                f"k={k} neighbours cannot be found in a bank of {len(self)} normal images: choose 1 to {len(self)}."
            )
