"""Time of the nearest-neighbour search by backend and size of the bank, against what the machine could do at best.

    python experiments/bench/search.py [--dims 512] [--queries 1000] [--banks 1000 10000 100000 1000000] [--repeats 3]

The floor of a search is the larger of two times: its multiply-adds at the speed of one large matrix product, and one
reading of bank and queries at the speed of a copy, both measured here. Medians of alternating repeats.
"""

import argparse
import math
from statistics import median

import torch
from clock import DEVICE, clock

from panda_lightning import KNNIndex


def machine():
    """Multiply-adds and bytes a second."""
    side = 2048 if DEVICE == "cpu" else 8192
    a, big, other = torch.randn(side, side, device=DEVICE), *torch.zeros(2, 2**26, device=DEVICE)
    product = min(clock(lambda: a @ a) for _ in range(5))
    copy = min(clock(lambda: other.copy_(big)) for _ in range(5))
    return side**3 / product, 2 * 4 * len(big) / copy


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--banks", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    macs, bandwidth = machine()
    print(f"{DEVICE}: {macs / 1e9:.0f} G multiply-adds/s, {bandwidth / 1e9:.1f} GB/s; {options.dims} dimensions")
    print(f"{options.queries} queries, k = 2, medians of {options.repeats}\n")
    print("| bank | torch fit, ms | torch search, ms | faiss fit, ms | faiss search, ms | floor, ms | floor / better |")
    print("|---|---|---|---|---|---|---|")
    queries, before = torch.randn(options.queries, options.dims, device=DEVICE), {}
    for size in options.banks:
        bank, times = torch.randn(size, options.dims, device=DEVICE), {}
        KNNIndex().fit(bank[:100]).search(queries[:10], 2)
        for _ in range(options.repeats):
            for backend in ("torch", "faiss"):
                index = KNNIndex(backend)
                times.setdefault((backend, "fit"), []).append(clock(lambda i=index: i.fit(bank)))  # noqa: B023
                times.setdefault((backend, "search"), []).append(clock(lambda i=index: i.search(queries, 2)))
        found = {key: median(values) for key, values in times.items()}
        floor = max(
            size * options.queries * options.dims / macs, 4 * options.dims * (size + options.queries) / bandwidth
        )
        best = min(found["torch", "search"], found["faiss", "search"])
        cells = " | ".join(f"{1000 * seconds:,.1f}" for seconds in (*found.values(), floor))
        print(f"| {size:,} | {cells} | {floor / best:.2f} |", flush=True)
        if before:
            growth = {k: math.log(v / before[k]) / math.log(size / before["size"]) for k, v in found.items()}
            print("| growth | " + " | ".join(f"n^{g:.2f}" for g in growth.values()) + " | | |", flush=True)
        before = {**found, "size": size}


if __name__ == "__main__":
    main()
