"""The search of a bank in parts, one on each process."""

from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.processes import of_each, sum_of_all, world_size
from panda_lightning.runtime.systems import wide_device
from panda_lightning.search.candidates import packed, total, unpacked
from panda_lightning.search.knn import KNNIndex


class ShardedIndex(KNNIndex):
    """The same search where each process holds a part of the bank: row i of process r is row i * world + r of it.

    Each searches its part for the queries of all, and keeps of all answers the k best to its own. So all must search at
    the same time; one that has no more queries calls ``serve``. ``fit`` and ``search`` give what KNNIndex gives.
    """

    ROUND = 4096  # rows of each process that are sent at once

    @override
    def empty(self) -> KNNIndex:  # type: ignore[override]
        return KNNIndex(self.backend, self.memory_mb)

    @override
    def fit(self, bank: Tensor) -> Self:
        sums = sum_of_all(torch.cat([total(bank), self._count(bank)]))
        self._size = int(sums[-1])
        if not self._size:
            return super().fit(bank)  # which refuses it
        return self._take(bank, sums[:-1] / sums[-1])

    @override
    def __len__(self) -> int:
        return self._size

    @override
    def own(self, bank: Tensor) -> Tensor:
        return bank[dist.get_rank() :: world_size()].clone() if world_size() > 1 else bank

    @override
    def rows(self, count: int) -> Tensor:
        return torch.arange(count) * world_size() + (dist.get_rank() if world_size() > 1 else 0)

    @override
    def mean(self, values: Tensor) -> Tensor:
        if world_size() == 1:
            return super().mean(values)
        total = of_each(torch.cat([values.sum(dim=0, dtype=torch.float64).flatten(), self._count(values)])).sum(dim=0)
        return (total[:-1] / total[-1]).view(values.shape[1:]).to(values)

    @staticmethod
    def _count(values: Tensor) -> Tensor:
        return torch.tensor([len(values)], dtype=torch.float64, device=wide_device(values.device))

    @override
    def whole(self, bank: Tensor) -> Tensor:
        if world_size() == 1:
            return bank.cpu()
        rows = self.rows(len(bank)).to(bank.device)
        count = -(-int(of_each(self._count(bank)).max()) // self.ROUND)  # as many pieces on every process
        pieces = [
            tuple(column.cpu() for column in gather([(rows[piece], bank[piece])]))
            for piece in (slice(i * self.ROUND, (i + 1) * self.ROUND) for i in range(count))
        ]
        _, merged = gather(pieces, merged=False)
        return merged

    @override
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self._check(k)
        if world_size() == 1 or not len(queries):
            return self._search(queries, k)
        rounds = [self._round(some, k) for some in torch.split(queries.detach().float(), self.ROUND)]
        # no round is None where there are queries
        distance, row = (torch.cat(column) for column in zip(*filter(None, rounds), strict=True))
        return distance, row

    @override
    def serve(self) -> None:
        while world_size() > 1 and self._round(self._mean.new_empty(0, len(self._mean)), 0):
            pass

    def _round(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """One search of all processes, each with its number of queries and its k; None if none has queries."""
        world, rank = world_size(), dist.get_rank()
        wanted = of_each(torch.tensor([len(queries), k], device=queries.device))
        most, largest = wanted.amax(dim=0).tolist()
        if not most:
            return None
        padded = queries.new_zeros(most, queries.shape[1])
        padded[: len(queries)] = queries
        asked = torch.arange(most, device=queries.device) < wanted[:, :1]  # (asking process, query)
        distance = queries.new_full((world, most, largest), torch.inf)
        row = torch.zeros(distance.shape, dtype=torch.long, device=queries.device)
        everyone, near = of_each(padded)[asked], min(largest, self._rows)
        if near:
            distance[..., :near][asked], rows = self._search(everyone, near)
            row[..., :near][asked] = rows * world + rank
        # (answering process, asking process, query, k) -> this process's queries, (query, all answers)
        answers = (of_each(t)[:, rank].transpose(0, 1).flatten(1) for t in (distance, row))
        keys = packed(*(t[: len(queries)] for t in answers))
        return unpacked(keys.topk(k, largest=False).values)
