"""The search as a graph: for files that other programs run."""

from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from panda_lightning.search.knn import KNNIndex


class TracedIndex(KNNIndex):
    """Exact search without a choice that depends on values, so that it can be traced.

    Neighbours are named in float64, whose products cancel no digit that counts, and distances are computed by
    differences in float32, as KNNIndex does. The bank may be of half precision.
    """

    ROWS = 8192  # of the bank in a step
    bank: Tensor

    @override
    def fit(self, bank: Tensor) -> Self:
        self.bank, self._rows = bank, bank.shape[:-1].numel()
        return self

    @override
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self._check(k)
        row = self._nearest(queries, self.bank, k)
        return (queries.float().unsqueeze(1) - self.bank[row].float()).square().sum(dim=2), row

    @override
    def nearest_in_each(self, queries: Tensor, pieces: Tensor) -> Tensor:
        banks = self.bank[pieces].flatten(1, 2)
        row = self._nearest(queries, banks, 1)
        found = banks.gather(1, row.expand(-1, -1, banks.shape[2]))
        return (queries.float() - found.float()).square().sum(dim=2)

    def _nearest(self, queries: Tensor, bank: Tensor, k: int) -> Tensor:
        """The numbers (..., B, k) of the k rows of a bank (..., N, D) that are nearest to queries (..., B, D)."""
        # Signs and factors stand where they keep onnxruntime from joining a product in float64 with a transposition,
        # for which it has no kernel in versions up to 1.24.
        wide, found = -queries.double(), []
        for start in range(0, bank.shape[-2], self.ROWS):
            rows = bank[..., start : start + self.ROWS, :].double()
            near = rows.square().sum(dim=-1).unsqueeze(-2) + wide @ (2 * rows.mT)  # but for |q|^2
            value, row = near.topk(min(k, rows.shape[-2]), largest=False)
            found.append((value, row + start))
            if len(found) > 1:
                value, row = (torch.cat(column, dim=-1) for column in zip(*found, strict=True))
                value, best = value.topk(min(k, value.shape[-1]), largest=False)
                found = [(value, row.gather(-1, best))]
        return found[0][1]
