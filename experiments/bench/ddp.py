"""What several processes cost an epoch beside the network: the bank's gathering, its index, and the search.

    python experiments/bench/ddp.py [--rows 5000 50000 500000] [--dims 512] [--queries 512] [--worlds 1 2 4]
        [--product 1e13] [--memory 1e12] [--bandwidth 1.25e9] [--latency 1e-4]

Steps are those of RebuildIndex and a validation: gather the features that each process has of its own images, fit the
index, search for the own queries in batches, bring the scores together; then what a checkpoint of the epoch needs of a
bank in parts. Processes talk by gloo, one thread each, on this machine: they share its cores and its memory. Seconds
are medians of repeats, from barrier to barrier. Calls and bytes are those of torch.distributed that one process sees
in an epoch, counted where they are made; bytes are what it receives.

The model, in brackets: multiply-adds, bytes of memory, bytes received and calls of one process as functions of the
number of processes, each at a rate. Of the processes measured here the rates are those of one alone (of a search with
as many queries at once), the network's those of all_gather between two; where processes are more than cores, times grow
by their ratio. For 8 and 64 processes rates are the options: multiply-adds/s of a search, bytes/s of memory, bytes/s
that a process receives, seconds a call.
"""

import argparse
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from panda_lightning.runtime.gathering import gather
from panda_lightning.search.knn import KNNIndex
from panda_lightning.search.sharded import ShardedIndex

HOME = Path(__file__).resolve().parents[2]
K, BATCH = 2, 128  # neighbours; queries of a step, as data modules have it
PHASES = ("gather", "index", "score", "save")
KINDS = {"replicated": KNNIndex, "sharded": ShardedIndex}
HUGE = (8, 64)  # processes that only the model knows


# ---- a process -------------------------------------------------------------------------------------------------------


class Counted:
    """Collectives that this process took part in, and bytes that it received by them."""

    def __init__(self):
        self.calls = self.received = 0
        others = dist.get_world_size() - 1
        sizes = {
            "all_gather": lambda parts, tensor: others * tensor.nbytes,
            "all_reduce": lambda tensor: 2 * others * tensor.nbytes // (others + 1),  # in a ring
            "all_gather_object": lambda parts, value: others * len(pickle.dumps(value)),
        }
        for name, size in sizes.items():
            setattr(dist, name, self._counted(getattr(dist, name), size))

    def _counted(self, call, size):
        def counted(*args):
            self.calls += 1
            self.received += size(*args)
            return call(*args)

        return counted


def epoch(index, parts, queries, rank, world):
    """Seconds of each phase, seconds of processor time, and the scores in order."""
    seconds, busy = {}, time.process_time()
    sharded = isinstance(index, ShardedIndex)

    def lap(name, work):
        dist.barrier()
        start = time.perf_counter()
        found = work()
        dist.barrier()
        seconds[name] = time.perf_counter() - start
        return found

    def score():
        found = []
        for batch in torch.split(torch.arange(rank, len(queries), world), BATCH):
            found.append((batch, index.search(queries[batch], K)[0].sum(dim=1)))
        index.serve()
        return gather(found)[1]

    bank = lap("gather", lambda: gather(parts, merged=not sharded))[1]
    lap("index", lambda: index.fit(bank))
    scores = lap("score", score)
    lap("save", lambda: index.whole(bank))
    return seconds, time.process_time() - busy, scores


def process(options):
    """All banks, either way; process 0 prints a line of JSON for each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    counted, found = Counted(), {}
    if world == 2:  # the rate of the network that this machine is to itself
        tensor = torch.zeros(2**24)
        seconds = []
        for several, times in ((tensor, 3), (tensor[:1], 100)):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(times):
                dist.all_gather([torch.empty_like(several) for _ in range(2)], several)
            seconds.append((time.perf_counter() - start) / times)
        found["network"] = {"bandwidth": tensor.nbytes / seconds[0], "latency": seconds[1]}
    for rows in options.rows:
        mine = torch.arange(rank, rows, world)
        values = torch.randn(len(mine), options.dims, generator=torch.Generator().manual_seed(rank))
        parts = list(zip(torch.split(mine, BATCH), torch.split(values, BATCH), strict=True))
        queries = torch.randn(options.queries, options.dims, generator=torch.Generator().manual_seed(99))
        scores = {}
        for kind, index in KINDS.items():
            if kind == "replicated" and not fits(rows, options.dims, world):
                continue
            runs = []
            for _ in range(options.repeats):
                counted.calls = counted.received = 0
                seconds, busy, scores[kind] = epoch(index(), parts, queries, rank, world)
                runs.append((seconds, busy))
            times = {name: median(seconds[name] for seconds, _ in runs) for name in PHASES}
            own = {"busy": median(busy for _, busy in runs), "calls": counted.calls, "received": counted.received}
            found[f"{rows} {kind}"] = {**times, **own}
        if len(scores) == 2:
            torch.testing.assert_close(*scores.values())
        for many in {1, *options.worlds} if world == 1 else ():  # as a bank in so many parts is asked
            index, seconds = KNNIndex().fit(values[::many].contiguous()), []
            for _ in range(options.repeats):
                start = time.perf_counter()
                for batch in torch.split(queries, BATCH * many):
                    index.search(batch, K)
                seconds.append(time.perf_counter() - start)
            found[f"{rows} by {many}"] = options.queries * len(index) * options.dims / median(seconds)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def fits(rows, dims, world):
    """Whether whole banks of all processes on this machine do: parts, all, in order, and the index's copy."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    return 3.5 * 4 * rows * dims * world < 0.8 * 1024 * kib


def started(world, words):
    """What process 0 of so many found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    base |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HOME / "src")}
    command = [sys.executable, "-W", "ignore", __file__, *words, "--here"]
    several = [subprocess.Popen(command, env=base | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
               for rank in range(world)]  # fmt: skip
    said = [one.communicate()[0] for one in several]
    if any(one.returncode for one in several):
        sys.exit(f"{world} processes did not come to an end.")
    return json.loads(said[0].splitlines()[-1])


# ---- the model -------------------------------------------------------------------------------------------------------


def work(kind, rows, dims, queries, world):
    """Of one process and each phase: multiply-adds, bytes of memory, bytes received, calls."""
    bank, others = 4 * rows * dims, (world - 1) / world
    product, everyone = queries * rows * dims / world, others * rows * (4 * dims + 8)
    # the scores of all, which are brought together at the end
    together = (others * queries * 12, 3) if world > 1 else (0, 0)
    alone = {"save": (0, 0, 0, 0), "score": (product, 0, *together)}
    if world == 1:
        return {"gather": (0, 2 * bank, 0, 0), "index": (0, 4 * bank, 0, 0), **alone}
    if kind == "replicated":  # own rows twice, those of all twice, read and written
        return {"gather": (0, (4 + 4 / world) * bank, everyone, 3), "index": (0, 4 * bank, 0, 0), **alone}
    rounds = math.ceil(math.ceil(queries / world) / BATCH)
    # every process receives the queries of all, and the answers of each to all
    asked = others * queries * 4 * dims + (world - 1) * queries * K * 12
    pieces = math.ceil(math.ceil(rows / world) / ShardedIndex.ROUND)
    return {
        "gather": (0, 2 * bank / world, 0, 1),
        "index": (0, 4 * bank / world, 2 * others * 8 * (dims + 1), 1),
        "score": (product, 0, asked + together[0], 4 * rounds + 1 + together[1]),
        "save": (0, (6 + 4 / world) * bank, everyone, 2 + 3 * pieces),
    }


def predicted(kind, rows, dims, queries, world, rates, crowd=1.0):
    """Seconds of each phase; ``crowd`` processes share a core."""
    seconds = {}
    for phase, (product, memory, received, calls) in work(kind, rows, dims, queries, world).items():
        copying = memory / (rates["index"] if phase == "index" else rates["memory"])
        network = received / rates["bandwidth"] + calls * rates["latency"] if world > 1 else 0
        seconds[phase] = crowd * (product / rates["product"] + copying + network)
    return seconds


def rates_of(one, network, kind, rows, dims, queries, world):
    """Rates of this machine, from what one process did with the same bank."""
    amounts, found = work(kind, rows, dims, queries, 1), one[f"{rows} {kind}"]
    rates = {"memory": amounts["gather"][1] / found["gather"], "index": amounts["index"][1] / found["index"], **network}
    return rates | {"product": one[f"{rows} by {world if kind == 'sharded' else 1}"]}


# ---- the table -------------------------------------------------------------------------------------------------------


def main(options):
    """Measure, model, print."""
    words = [f"--dims={options.dims}", f"--queries={options.queries}", f"--repeats={options.repeats}"]
    words += ["--rows", *map(str, options.rows), "--worlds", *map(str, options.worlds)]
    found = {world: started(world, words) for world in sorted({1, 2, *options.worlds})}
    network = found[2]["network"]
    cores = os.cpu_count() or 1
    given = {"product": options.product, "memory": options.memory, "index": options.memory}
    given |= {"bandwidth": options.bandwidth, "latency": options.latency}
    print(f"{options.dims} dimensions, {options.queries} queries, k = {K}; {cores} cores, one thread a process, gloo, ")
    print(f"medians of {options.repeats}; torch {torch.__version__}; milliseconds, measured (model)\n")
    heads = ("rows", "bank", "processes", *PHASES, "processor, of one", "calls", "MB received", "largest part")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    largest, errors, counts = {}, [], []
    for rows in options.rows:
        for kind in KINDS:
            bank = (kind, rows, options.dims, options.queries)
            for world in (*options.worlds, *HUGE):
                amounts, own = work(*bank, world).values(), found.get(world, {}).get(f"{rows} {kind}")
                received, calls = (sum(part[i] for part in amounts) for i in (2, 3))
                if world in HUGE:
                    seconds = predicted(*bank, world, given)
                    largest[rows, kind, world] = top = share(seconds)
                    cells = [f"({1000 * seconds[phase]:,.1f})" for phase in PHASES]
                    cells += ["", f"({calls})", f"({received / 1e6:,.1f})", f"({top})"]
                elif own is None:
                    cells = ["does not fit here", *[""] * 7]
                else:
                    rates = rates_of(found[1], network, *bank, world)
                    seconds = predicted(*bank, world, rates, max(1.0, world / cores))
                    cells = [f"{1000 * own[phase]:,.1f} ({1000 * seconds[phase]:,.1f})" for phase in PHASES]
                    cells += [f"{1000 * own['busy']:,.0f}", f"{own['calls']} ({calls})"]
                    cells += [f"{own['received'] / 1e6:,.1f} ({received / 1e6:,.1f})"]
                    cells += [share({phase: own[phase] for phase in PHASES})]
                    if world > 1:
                        errors.append(sum(own[phase] for phase in PHASES) / sum(seconds.values()))
                        counts.append(abs(own["received"] / received - 1))
                print(f"| {rows:,} | {kind} | {world} | {' | '.join(cells)} |", flush=True)
    spread = f"{min(errors):.2f} to {max(errors):.2f} times the model's (median {median(errors):.2f})"
    print(f"\nOf several processes, measured sums over the phases are {spread}, ", end="")
    print(f"bytes within {max(counts):.1%}; they share {cores} cores, so that more gain nothing here.")
    rows = options.rows[-1]
    parts = [f"{kind} at {world}: {largest[rows, kind, world]}" for world in HUGE for kind in KINDS]
    print(f"Of {rows:,} rows the largest part by the model is {'; '.join(parts)}; save comes once a checkpoint.")
    print(f"Each process has {options.product:.3g} multiply-adds/s, {options.memory:.3g} B/s of memory, ", end="")
    print(f"{options.bandwidth:.3g} B/s received and {options.latency:.3g} s a call there.")


def share(seconds):
    """The largest phase, and its part of all."""
    phase = max(seconds, key=seconds.__getitem__)
    return f"{phase} {seconds[phase] / sum(seconds.values()):.0%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 50_000, 500_000])
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    for name, default in (("product", 1e13), ("memory", 1e12), ("bandwidth", 1.25e9), ("latency", 1e-4)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    process(options) if options.here else main(options)
