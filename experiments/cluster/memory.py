"""Resident memory over 30 rebuilds of the index, as a run does one an epoch: python experiments/cluster/memory.py.

The line ends with the growth from the fifth rebuild to the last, after the allocator has settled.
"""

import resource

import torch

from panda_lightning import KNNIndex

ROWS, DIM, REBUILDS = 20_000, 512, 30


def resident() -> float:
    """MiB of this process in memory now."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


torch.manual_seed(0)
queries = torch.randn(500, DIM)
for backend in ("torch", "faiss"):
    index, seen = KNNIndex(backend), []
    for _ in range(REBUILDS):
        index.fit(torch.randn(ROWS, DIM)).search(queries, 2)
        seen.append(resident())
    print(f"{backend}: bank of {ROWS * DIM * 4 / 2**20:.0f} MiB, after 1, 5, 10, 20, 30 rebuilds "
          f"{', '.join(f'{seen[n - 1]:.0f}' for n in (1, 5, 10, 20, 30))} MiB: {seen[-1] - seen[4]:+.1f}")  # fmt: skip
