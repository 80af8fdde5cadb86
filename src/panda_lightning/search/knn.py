"""Exact nearest neighbours: the feature bank and its search."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Self

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from panda_lightning.types import PandaError

Backend = Literal["auto", "torch", "faiss"]


class KNNIndex:
    """Exact k-nearest-neighbour search by squared Euclidean distance, in float32 whatever the features' type.

    The matrix-product form |q|^2 - 2 q.b + |b|^2 is fast but cancels digits, so it only names candidates, a few more
    than k, after the bank's mean is subtracted from both sides; the distances returned are computed by differences.
    torch names them in large banks by groups of rows: the k nearest rows lie in the k groups with the nearest members,
    and the minimum of a group costs much less than a selection among its rows.

    Args:
        backend: torch, faiss, or auto: torch on a GPU; on a CPU faiss, where it is installed, but torch for features of
            at most 128 dimensions, for which it is faster (experiments/RESULTS.md).
        memory_mb: Roughly the memory that one chunk of a search may take, in MiB.
    """

    EXTRA = 8  # candidates beyond k, so that rounding in the matrix product drops no neighbour
    GROUP = 64  # rows

    def __init__(self, backend: Backend = "auto", memory_mb: int = 512) -> None:
        self.backend = backend
        self.memory_mb = memory_mb
        self._bank: Tensor | None = None

    def fit(self, bank: Tensor) -> Self:
        """Take the bank, on the device where it lies.

        Args:
            bank: (N, D) features.
        """
        if bank.ndim != 2 or not len(bank):
            raise PandaError(f"a bank of shape {tuple(bank.shape)} cannot be searched: give (N, D) with N > 0.")
        return self._take(bank, bank.mean(dim=0, dtype=torch.float64))

    def _take(self, bank: Tensor, mean: Tensor) -> Self:
        self._faiss = _use_faiss(self.backend, bank)
        self._rows = len(bank)
        bank = bank.detach().float()
        self._mean = mean.float()
        self._bank = (bank - self._mean).contiguous()
        if not self._faiss:  # which computes its own norms
            norms = torch.linalg.vector_norm(self._bank, dim=1).square()
            missing = -len(bank) % self.GROUP  # groups are filled up with what is nobody's neighbour
            self._norms = F.pad(norms, (0, missing), value=torch.inf)
            self._bank = F.pad(self._bank, (0, 0, 0, missing), value=1e18)
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
            PandaError: If k does not fit the bank.
        """
        assert self._bank is not None, "fit comes before search"
        self._check(k)
        return self._search(queries, k)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        assert self._bank is not None
        if not len(queries):
            return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.long)
        count = min(k + self.EXTRA, self._rows)
        group = self.GROUP if not self._faiss and self._rows >= self.GROUP**2 * count else 1
        # a row of a chunk holds its candidates' differences and, but for faiss, its products with the bank
        row_bytes = 4 * (2 * count * group * self._bank.shape[1] + (0 if self._faiss else 2 * self._rows))
        rows = max(1, self.memory_mb * 2**20 // row_bytes)
        # differences on a CPU are taken a few rows at a time, which stay in its caches
        block = max(1, 2**20 // (count * group * self._bank.shape[1])) if self._bank.device.type == "cpu" else rows
        distances, neighbours = [], []
        with full_float32(self._bank.device):
            for chunk in torch.split(queries.detach().float() - self._mean, rows):
                near = self._candidates(chunk, count, group)
                pieces = zip(torch.split(chunk, block), torch.split(near, block), strict=True)
                exact = torch.cat([self._distances(*piece) for piece in pieces])
                distance, order = exact.topk(k, largest=False)  # sorted
                distances.append(distance)
                neighbours.append(near.gather(1, order))
        return torch.cat(distances), torch.cat(neighbours)

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
        assert self._bank is not None
        return (queries.unsqueeze(1) - self._bank[near]).square_().sum(dim=2)

    def _candidates(self, queries: Tensor, count: int, group: int) -> Tensor:
        """Numbers of the rows in the ``count`` groups nearest to each query by the matrix-product form, (B, ...)."""
        assert self._bank is not None
        if self._faiss:
            import faiss
            import faiss.contrib.torch_utils

            if self._bank.is_cuda:
                _, near = faiss.knn_gpu(_gpu_resources(), queries, self._bank, count)
                return torch.as_tensor(near)
            return torch.from_numpy(faiss.knn(queries.numpy(), self._bank.numpy(), count)[1])
        # on a CPU in blocks that stay in its caches
        rows, columns = (256, 2048) if self._bank.device.type == "cpu" else (len(queries), len(self._bank))
        bank = list(zip(torch.split(self._norms, columns), torch.split(self._bank, columns), strict=True))
        found = []
        for some in torch.split(queries, rows):
            products = (torch.addmm(n, some, b.T, alpha=-2) for n, b in bank)
            least = [p.view(len(some), -1, group).amin(dim=2) if group > 1 else p for p in products]
            found.append(torch.cat(least, dim=1).topk(count, largest=False, sorted=False).indices)
        first = torch.cat(found).unsqueeze(2) * group
        return (first + torch.arange(group, device=first.device)).flatten(1)


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
    """Neither TF32 nor autocast: half-precision products would name wrong candidates."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
