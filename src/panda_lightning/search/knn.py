"""Exact nearest neighbours: the feature bank and its search."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Self

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from panda_lightning.arguments import Checked, Number
from panda_lightning.types import PandaError

Backend = Literal["auto", "torch", "faiss"]


class KNNIndex(Checked):
    """Exact k-nearest-neighbour search by squared Euclidean distance, in float32 whatever the features' type.

    The distances returned are those of the k nearest rows, but for float32's rounding of a sum of squared differences:
    a relative error of (D + 2) 2^-24 at most, mostly of 1e-7. Of rows that differ by no more than that, any may come.

    The matrix-product form |q|^2 - 2 q.b + |b|^2 is fast but cancels digits, so it only names candidates, a few more
    than k, after the bank's mean is subtracted from both sides; the distances returned are computed by differences.
    Where the form's rounding might hide a nearer row, the query is searched again among eight times as many candidates,
    in the end among all rows. torch names candidates in large banks by groups of rows: the k nearest rows lie in the k
    groups with the nearest members, and the minimum of a group costs much less than a selection among its rows.

    Args:
        backend: torch, faiss, or auto: torch on a GPU; on a CPU faiss, where it is installed, but torch for features of
            at most 128 dimensions, for which it is faster (experiments/RESULTS.md).
        memory_mb: Roughly the memory that one chunk of a search may take, in MiB; a chunk has at least one query.
    """

    EXTRA = 8  # candidates beyond k, so that rounding in the matrix product seldom hides a neighbour
    GROUP = 64  # rows

    def __init__(self, backend: Backend = "auto", memory_mb: Number = 512) -> None:
        self.backend = backend
        self.memory_mb = memory_mb
        self._bank: Tensor | None = None

    def empty(self) -> Self:
        """Another index of this kind, for a bank that each process has all of."""
        return type(self)(self.backend, self.memory_mb)

    def fit(self, bank: Tensor) -> Self:
        """Take the bank, on the device where it lies.

        Args:
            bank: (N, D) features. The index goes on reading them, so they must not be written to.
        """
        if bank.ndim != 2 or not len(bank):
            raise PandaError(f"a bank of shape {tuple(bank.shape)} cannot be searched: give (N, D) with N > 0.")
        return self._take(bank, bank.mean(dim=0, dtype=torch.float64))

    def _take(self, bank: Tensor, mean: Tensor) -> Self:
        self._faiss = _use_faiss(self.backend, bank)
        self._rows = len(bank)
        self._given = bank.detach()
        self._mean = mean.float()
        self._bank = (self._given.float() - self._mean).contiguous()
        if not self._faiss:  # which computes its own norms
            self._norms = torch.linalg.vector_norm(self._bank, dim=1).square()
        # numbers in a block of differences: those of a CPU stay in its caches
        self._block = 2**20 if bank.device.type == "cpu" else self.memory_mb * 2**17
        return self

    def __len__(self) -> int:
        return 0 if self._bank is None else self._rows

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
        if self._bank is None:
            raise PandaError("there is no bank of normal images yet: a test makes it, or a validation of fit.")
        self._check(k)
        return self._search(queries, k)

    def nearest_in_each(self, queries: Tensor, banks: Tensor) -> Tensor:
        """Squared distances (B, P) of queries (B, P, D), each to the nearest row of its own bank of (B, N, D)."""
        pairs = zip(queries, banks, strict=True)
        return torch.stack([self.empty().fit(bank).search(some, 1)[0][:, 0] for some, bank in pairs])

    def _search(self, queries: Tensor, k: int, times: int = 1) -> tuple[Tensor, Tensor]:
        """The search among ``times`` as many candidates as should be enough, or more where they are not."""
        assert self._bank is not None
        if not len(queries):
            return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.long)
        queries, dim = queries.detach().float(), self._bank.shape[1]
        count = min((k + self.EXTRA) * times, self._rows)
        if self._faiss and self._bank.is_cuda and count > 2048:  # more than it can find there
            count = self._rows
        group = self.GROUP if not self._faiss and self._rows >= self.GROUP**2 * count else 1
        # a row of a chunk holds its candidates' differences and, but for faiss, its products with the bank
        row_bytes = 4 * (2 * count * group * dim + (0 if self._faiss else 2 * self._rows))
        rows, block = max(1, self.memory_mb * 2**20 // row_bytes), max(1, self._block // (count * group * dim))
        found = []
        with full_float32(self._bank.device):
            for chunk in torch.split(queries, rows):
                centred = chunk - self._mean
                near, beyond = self._candidates(centred, count, group)
                pieces = zip(torch.split(chunk, block), torch.split(near, block), strict=True)
                exact = torch.cat([self._distances(*piece) for piece in pieces])
                distance, order = exact.topk(k, largest=False)  # sorted
                found.append((distance, near.gather(1, order), _may_miss(centred, distance[:, -1], beyond)))
        distance, neighbour, missing = (torch.cat(column) for column in zip(*found, strict=True))
        again = missing.nonzero().flatten()
        if len(again):
            distance[again], neighbour[again] = self._search(queries[again], k, 8 * times)
        return distance, neighbour

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

    def _distances(self, queries: Tensor, near: Tensor) -> Tensor:
        """Squared distances of each query (B, D) to its candidates (B, count), (B, count)."""
        found = []
        for some in torch.split(near, max(1, self._block // queries.numel()), dim=1):
            rows = self._given.index_select(0, some.flatten()).float().view(*some.shape, -1)
            found.append((queries.unsqueeze(1) - rows).square_().sum(dim=2))  # of the features as they were given
        return torch.cat(found, dim=1)

    def _candidates(self, queries: Tensor, count: int, group: int) -> tuple[Tensor, Tensor]:
        """Rows in the ``count`` groups nearest to each query by the matrix-product form, (B, ...).

        Also the squared distance by the same form beyond which all other rows are, (B,).
        """
        assert self._bank is not None
        if count == self._rows:
            near = torch.arange(count, device=queries.device).expand(len(queries), count)
            return near, queries.new_full((len(queries),), torch.inf)
        if self._faiss:
            import faiss
            import faiss.contrib.torch_utils

            if self._bank.is_cuda:
                nearest: Any = faiss.knn_gpu(_gpu_resources(), queries, self._bank, count)
            else:
                nearest = faiss.knn(queries.numpy(), self._bank.numpy(), count)
            distance, near = (torch.as_tensor(t) for t in nearest)  # ascending; where there is NaN, -1 stands for none
            return near.clamp(min=0), distance[:, -1]
        whole = self._rows // group * group  # what is beside groups is a candidate anyway
        # on a CPU in blocks that stay in its caches
        rows, columns = (256, 2048) if self._bank.device.type == "cpu" else (len(queries), whole)
        bank = list(zip(*(torch.split(t[:whole], columns) for t in (self._norms, self._bank)), strict=True))
        found = []
        for some in torch.split(queries, rows):
            products = (torch.addmm(n, some, b.T, alpha=-2) for n, b in bank)
            least = [p.view(len(some), -1, group).amin(dim=2) if group > 1 else p for p in products]
            found.append(torch.cat(least, dim=1).topk(count, largest=False, sorted=False))
        value, first = (torch.cat(column) for column in zip(*found, strict=True))
        near = (first.unsqueeze(2) * group + torch.arange(group, device=first.device)).flatten(1)
        rest = torch.arange(whole, self._rows, device=first.device).expand(len(queries), -1)
        return torch.cat([near, rest], dim=1), value.amax(dim=1) + queries.double().square().sum(dim=1)


def _may_miss(queries: Tensor, distance: Tensor, beyond: Tensor) -> Tensor:
    """Whether a row beside the candidates may be nearer than the farthest one found, (B,).

    A sum of n products in float32, in whatever order, is wrong by at most n u / (1 - n u) times the sum of their sizes,
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). Rows nearer than d lie
    within R = |q| + sqrt(d) of the mean, so the matrix-product form is wrong for them by at most 2 R (|q| + R) times
    that, n being D and a few for the sums with the norms and the subtracted mean.

    Args:
        queries: (B, D), less the bank's mean.
        distance: Squared, of the farthest one found, (B,).
        beyond: What the form gives at least for all rows beside the candidates, (B,).
    """
    n = queries.shape[1] + 8
    norm: Tensor = torch.linalg.vector_norm(queries, dim=1, dtype=torch.float64)
    radius = norm + distance.double().sqrt()
    error = 2 * radius * (norm + radius) * n / (2**24 - n)
    return distance > (beyond - error).clamp(min=0)


def _use_faiss(backend: Backend, bank: Tensor) -> bool:
    if backend == "torch" or (backend == "auto" and (bank.device.type != "cpu" or bank.shape[1] <= 128)):
        return False
    if find_spec("faiss") is not None:
        return True
    if backend == "auto":
        _say_once("faiss is not installed: the kNN search runs in torch.")
        return False
    raise PandaError("index_backend=faiss, but faiss is not installed: install it, or choose torch or auto.")


@cache
def _say_once(line: str) -> None:
    rank_zero_info(line)


@cache
def _gpu_resources() -> Any:
    """One faiss resources object a process: each holds GPU memory for good."""
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 * 2**20)
    return resources


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No products in TF32 or bfloat16, whatever was set, nor autocast: they would name wrong candidates."""
    with ExitStack() as undo:
        undo.enter_context(torch.autocast(device.type, enabled=False))
        if not hasattr(torch._C, "_get_fp32_precision_getter"):  # torch < 2.9
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        else:
            # A setting without a value of its own reads as the one above it. So, from the top, one that is still low
            # has its own, which can be put back. Not by torch.backends: mkldnn's there sets the one above.
            backend = "cuda" if device.type == "cuda" else "mkldnn"
            for setting in (("generic", "all"), (backend, "all"), (backend, "matmul")):
                before = torch._C._get_fp32_precision_getter(*setting)
                if before not in ("none", "ieee"):
                    undo.callback(torch._C._set_fp32_precision_setter, *setting, before)
                    torch._C._set_fp32_precision_setter(*setting, "ieee")
        yield
