"""Seconds of each phase with one process and with two, one thread each.

python experiments/cluster/scaling.py DATA OUT

A run of Fashion-MNIST with the bundled network (no prefix cache: every image passes all layers), and the search of a
bank by itself, whole on each process and in parts.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
RUN = """-m panda_lightning fit
--config {root}/conf/fashion_mnist.yaml --config {root}/conf/variants/early.yaml
--data.root {data} --data.normal_class 0 --data.train_limit 1024 --data.test_limit 1024 --data.image_size 64
--data.crop squash --model.backbone panda_tiny --model.prefix_cache_gb 0 --trainer.max_epochs 3
--trainer.accelerator cpu
--trainer.devices {n} --trainer.strategy {strategy} --trainer.enable_progress_bar false --trainer.logger CSVLogger
--trainer.logger.save_dir {out} --trainer.logger.name on{n}"""


def phases(data: str, out: Path, n: int) -> dict[str, float]:
    """Medians over the epochs of a run, as its report has them."""
    words = RUN.format(root=ROOT, data=data, out=out, n=n, strategy="ddp" if n > 1 else "auto").split()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    path = max(out.glob(f"on{n}/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    rows = torch.load(path, weights_only=True)["callbacks"]["Report"]["rows"][1:]
    names = {"training, 1,024 images": "train", "extraction, 1,024 images": "bank", "scoring, 1,024 images": "score"}
    return {title: median(row[f"seconds/{key}"] for row in rows) for title, key in names.items()}


def search() -> None:
    """In each process: its share of 1,024 queries to a bank of 50,000 x 512; process 0 prints the medians of five."""
    from panda_lightning.search.knn import KNNIndex
    from panda_lightning.search.sharded import ShardedIndex

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bank, queries = (torch.randn(n, 512, generator=torch.Generator().manual_seed(n)) for n in (50_000, 1024))
    whole, parts = KNNIndex().fit(bank), ShardedIndex().fit(bank[rank::world])
    for index in (whole, parts):
        seconds = []
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            index.search(queries[rank::world], 2)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        if rank == 0:
            print(median(seconds))


def searches(n: int) -> dict[str, float]:
    """Both kinds of search in n processes."""
    base = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": "29731", "WORLD_SIZE": str(n)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "search"], env=base | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(n)
    ]
    whole, parts = started[0].communicate()[0].split()
    return {"search, bank whole on each": float(whole), "search, bank in parts": float(parts)}


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    if sys.argv[1] == "search":
        search()
    else:
        one, two = (phases(sys.argv[1], Path(sys.argv[2]), n) | searches(n) for n in (1, 2))
        print("| phase | one process, s | two, s | ratio |\n|---|---|---|---|")
        for name, seconds in one.items():
            print(f"| {name} | {seconds:.2f} | {two[name]:.2f} | {seconds / two[name]:.2f} |")
