"""Time of the nearest-neighbour search beside scikit-learn, faiss and plain torch, and what the machine could do.

    python experiments/bench/search.py [--dims 24 128 2048] [--banks 10000 1000000] [--threads 1 2] [--full]

Methods: KNNIndex as it comes, the same with 128 queries at a time as a validation has them, with products in float32
(bfloat16 is taken where it is faster), and by faiss; scikit-learn's NearestNeighbors, brute force; faiss's IndexFlatL2;
torch's cdist and topk; the same from |q|^2 - 2 q.b + |b|^2. The last two take queries in portions of 512 MiB of
distances. One process for each number of threads (OMP_NUM_THREADS). On a GPU scikit-learn is left out, and faiss's
index is its GPU's.

Milliseconds, fit + search; medians of alternating repeats. Large banks are asked with fewer queries, so that rows times
queries stay 10^8 and multiply-adds 3 10^10. The short form leaves out banks of more than 3 10^8 numbers; --full takes
all that fit into memory. "not exact" names methods whose rows are not those of float64, with the share that is, of 50
queries. The floor of a search is the larger of two times: its multiply-adds at the speed of one large matrix product,
and one reading of bank and queries at the speed of a copy, both measured here. Growth is that of the seconds a query.
"""

import argparse
import math
import os
import subprocess
import sys
from statistics import median
from unittest import mock

import torch
from clock import DEVICE, clock

from panda_lightning import KNNIndex
from panda_lightning.search import knn

PORTION = 2**27  # distances
ASKED = 50  # queries whose neighbours float64 finds too


class Ours:
    """KNNIndex with a backend, asked some queries at a time."""

    def __init__(self, backend, batch=None):
        self.index, self.batch = KNNIndex(backend), batch

    def fit(self, bank):
        """Take the bank."""
        self.index.fit(bank)

    def search(self, queries, k):
        """The rows' numbers."""
        batches = torch.split(queries, self.batch or len(queries))
        return torch.cat([self.index.search(some, k)[1] for some in batches])


class Float32(Ours):
    """KNNIndex as it is on a processor that is not faster in bfloat16."""

    def __init__(self):
        super().__init__("torch")

    def fit(self, bank):
        """Take the bank."""
        with mock.patch.object(knn, "products_type", return_value=torch.float32):
            super().fit(bank)


class Sklearn:
    """scikit-learn's brute force."""

    def fit(self, bank):
        """Take the bank."""
        from sklearn.neighbors import NearestNeighbors

        self.index = NearestNeighbors(algorithm="brute").fit(bank.numpy())

    def search(self, queries, k):
        """The rows' numbers."""
        return torch.from_numpy(self.index.kneighbors(queries.numpy(), k, return_distance=False))


class Flat:
    """faiss's exact index."""

    def fit(self, bank):
        """Take the bank."""
        import faiss

        if DEVICE == "cuda":
            import faiss.contrib.torch_utils  # noqa: F401 # lets it take tensors

            self.index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), bank.shape[1])
            self.index.add(bank)
        else:
            self.index = faiss.IndexFlatL2(bank.shape[1])
            self.index.add(bank.numpy())

    def search(self, queries, k):
        """The rows' numbers."""
        return torch.as_tensor(self.index.search(queries if DEVICE == "cuda" else queries.numpy(), k)[1])


class Cdist:
    """What a script would write."""

    def fit(self, bank):
        """Take the bank."""
        self.bank = bank

    def distances(self, queries):
        """(B, N), of which the order counts."""
        return torch.cdist(queries, self.bank)

    def search(self, queries, k):
        """The rows' numbers."""
        portions = torch.split(queries, max(1, PORTION // len(self.bank)))
        return torch.cat([self.distances(some).topk(k, largest=False).indices for some in portions])


class Product(Cdist):
    """The same by one matrix product; |q|^2 changes no order."""

    def fit(self, bank):
        """Take the bank, and its norms."""
        self.bank, self.norms = bank, bank.square().sum(dim=1)

    def distances(self, queries):
        """(B, N), of which the order counts."""
        return torch.addmm(self.norms, queries, self.bank.T, alpha=-2)


METHODS = {
    "ours": lambda: Ours("auto"),
    "ours, by 128": lambda: Ours("auto", 128),
    "ours, float32": Float32,
    "ours, faiss": lambda: Ours("faiss"),
    "scikit-learn": Sklearn,
    "faiss flat": Flat,
    "torch cdist": Cdist,
    "torch product": Product,
}


def machine():
    """Multiply-adds and bytes a second."""
    side = 2048 if DEVICE == "cpu" else 8192
    a, big, other = torch.randn(side, side, device=DEVICE), *torch.zeros(2, 2**26, device=DEVICE)
    product = min(clock(lambda: a @ a) for _ in range(5))
    copy = min(clock(lambda: other.copy_(big)) for _ in range(5))
    return side**3 / product, 2 * 4 * len(big) / copy


def free():
    """Bytes of memory that can be had."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def nearest(queries, bank, k):
    """The rows of the k nearest in float64, from some thousand rows of the bank at a time."""
    wide, found = queries.double(), []
    for start in range(0, len(bank), 8192):
        near = torch.cdist(wide, bank[start : start + 8192].double()).topk(k, largest=False)
        found.append((near.values, near.indices + start))
    distance, rows = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
    return rows.gather(1, distance.topk(k, largest=False).indices)


def measured(bank, queries, methods, options):
    """Seconds of fit and search of each method, and its share of the neighbours that float64 finds."""
    right = nearest(queries[:ASKED], bank, options.k)
    for name in methods:  # imports, and what a library sets up once
        method = METHODS[name]()
        method.fit(bank[:100])
        method.search(queries[:10], options.k)
    times, exact = {name: ([], []) for name in methods}, {}
    for _ in range(options.repeats):
        for name in methods:
            method = METHODS[name]()
            times[name][0].append(clock(lambda m=method: m.fit(bank)))
            times[name][1].append(clock(lambda m=method, n=name: exact.update({n: m.search(queries, options.k)})))
            del method  # before the next takes its copy of the bank
    shares = {
        name: float((exact[name][:ASKED, :, None].to(right.device) == right[:, None]).any(dim=2).double().mean())
        for name in methods
    }
    return {name: tuple(median(values) for values in times[name]) for name in methods}, shares


def table(options):
    """Print the table of this process's threads."""
    methods = [name for name in METHODS if DEVICE == "cpu" or name != "scikit-learn"]
    macs, bandwidth = machine()
    where = DEVICE if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{where}: {macs / 1e9:.0f} G multiply-adds/s, {bandwidth / 1e9:.1f} GB/s; {options.queries} queries, ", end=""
    )
    print(f"fewer of large banks; k = {options.k}, ms of fit + search, medians of {options.repeats}\n")
    heads = ("dimensions", "bank", "queries", *methods, "floor", "best other / ours", "not exact")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for dims in options.dims:
        before = None
        for size in options.banks:
            asked = max(ASKED, min(options.queries, 10**8 // size, 3 * 10**10 // (size * dims)))
            if size * dims > 3e8 and not options.full:
                continue
            needed = 4 * size * dims * 2 + 4 * PORTION + 2**30  # the bank and a method's copy
            if needed > free():
                words = f"left out: {needed / 2**30:.0f} GiB needed, {free() / 2**30:.0f} there"
                print(f"| {dims} | {size:,} | {words} |{' |' * (len(heads) - 3)}", flush=True)
                continue
            generator = torch.Generator(DEVICE).manual_seed(0)
            bank, queries = (torch.randn(n, dims, generator=generator, device=DEVICE) for n in (size, asked))
            found, shares = measured(bank, queries, methods, options)
            del bank
            floor = max(size * asked * dims / macs, 4 * dims * (size + asked) / bandwidth)
            best = min(sum(found[name]) for name in methods if not name.startswith("ours")) / sum(found["ours"])
            short = [f"{name} {share:.3f}" for name, share in shares.items() if share < 1]
            cells = [f"{1000 * fit:,.1f} + {1000 * search:,.1f}" for fit, search in found.values()]
            line = [
                str(dims),
                f"{size:,}",
                str(asked),
                *cells,
                f"{1000 * floor:,.1f}",
                f"{best:.2f}",
                ", ".join(short) or "none",
            ]
            print(f"| {' | '.join(line)} |", flush=True)
            each = {name: seconds[1] / asked for name, seconds in found.items()}
            if before:
                growth = [math.log(each[name] / before[1][name]) / math.log(size / before[0]) for name in methods]
                print(f"| | growth | | {' | '.join(f'n^{g:.2f}' for g in growth)} | | | |", flush=True)
            before = (size, each)


def main():
    """One process for each number of threads; this one where none is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[24, 64, 128, 512, 2048])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--banks", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2] if DEVICE == "cpu" else [])
    parser.add_argument("--full", action="store_true", help="large banks of many dimensions too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-k", type=int, default=2)
    options = parser.parse_args()
    if options.here or not options.threads:
        table(options)
        return
    for threads in options.threads:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, *sys.argv, "--here"], check=True, env=environment)
        print(flush=True)


if __name__ == "__main__":
    main()
