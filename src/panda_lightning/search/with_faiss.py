"""The nearest rows by faiss's matrix products, where it is installed and chosen."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from panda_lightning.runtime.systems import widenable
from panda_lightning.search.candidates import reach
from panda_lightning.types import PandaError


def is_used(backend: str) -> bool:
    """Whether faiss searches, see KNNIndex.

    Raises:
        PandaError: If it is asked for and not installed.
    """
    if backend == "faiss" and find_spec("faiss") is None:
        raise PandaError("index_backend=faiss, but faiss is not installed: install it, or choose torch or auto.")
    return backend == "faiss"


def most(bank: Tensor) -> int:
    """How many rows of a bank (N, D) it can find at once."""
    return 2048 if bank.is_cuda else len(bank)


def nearest(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances by the matrix-product form of queries (B, D) to rows of a bank (N, D), ascending, and the rows.

    Both are (B, count). Where faiss finds no row, as for what is not finite, the distance is infinite and the row 0.
    """
    if bank.is_cuda:
        # faiss's own knn_gpu takes arrays alone; this one works on torch's stream, behind what makes the queries
        from faiss.contrib.torch_utils import torch_replacement_knn_gpu as knn_gpu

        with torch.cuda.device(bank.device):
            found: Any = knn_gpu(_gpu_resources(), queries, bank, count)  # type: ignore[no-untyped-call]  # of faiss
    else:
        import faiss

        found = faiss.knn(queries.numpy(), bank.numpy(), count)
    distance, near = (torch.as_tensor(t) for t in found)
    return distance.masked_fill(near < 0, torch.inf), near.clamp(min=0)


def candidates(queries: Tensor, bank: Tensor, k: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows (B, count) near queries (B, D), both less the bank's mean, and whether the k nearest are among them (B,)."""
    distance, near = nearest(queries, bank, count)
    sure = distance.isfinite().all(dim=1)
    if count < len(bank):
        wide, norm = (widenable(t).double() for t in (distance, torch.linalg.vector_norm(queries, dim=1)))
        zero = torch.zeros_like(norm)
        most = reach(queries.shape[1], torch.float32, wide[:, k - 1], norm, zero, zero[:1])
        sure &= (wide[:, -1] > most).to(sure.device)
    return near, sure


@cache
def _gpu_resources() -> Any:
    """One faiss resources object a process: each holds GPU memory for good."""
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 * 2**20)
    return resources
