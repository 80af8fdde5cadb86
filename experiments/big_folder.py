"""What a run costs on a folder of many files before its first batch, and the memory of the batches that follow.

    python experiments/big_folder.py FOLDER [COUNT] [CLASSES]

The folder gets COUNT images (1,300,000) as hard links to forty small JPEGs, nine of ten in train: of CLASSES classes
(1000), of which all but the first are normal, or of one normal class and, in test, another. DN2 then starts on it as
`lightning validate` would, 1 % held back, and its bank is stopped after 2,200 batches. The network is left out, so that
this is the cost of listing, looking and loading alone. Memory is that of the main process and of its largest worker.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from panda_lightning import DN2, ImageFolder
from panda_lightning.types import Batch

FILES, WARM, BATCHES = 40, 200, 2200


def resident(pid: int | str = "self") -> float:
    """MiB of a process in memory now."""
    return int(Path(f"/proc/{pid}/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def fill(root: Path, count: int, classes: int) -> None:
    """Make the files and their links, where they are not there."""
    (root / "files").mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = [root / f"files/{number}.jpg" for number in range(FILES)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        coarse.resize((160, 120)).save(file, quality=80)
    several = {"train": count * 9 // 10, "test": count // 10}
    number = 0
    for split, whole in several.items():
        names = [f"n{i:08d}" for i in range(classes)] if classes > 1 else ["good", "other"][: 1 + (split == "test")]
        for name in names:
            (root / split / name).mkdir(parents=True)
            for _ in range(whole // len(names)):
                os.link(files[number % FILES], root / split / name / f"{name}_{number:08d}.JPEG")
                number += 1


class EnoughError(Exception):
    """The bank has had its batches."""


class Loading(DN2):
    """DN2 without a network, which notes when batches come and what memory is taken."""

    def __init__(self) -> None:
        super().__init__("panda_tiny")
        self.seen: list[tuple[float, float, float]] = []

    def embed(self, batch: Batch) -> Tensor:
        """A feature of nothing."""
        if len(self.seen) == BATCHES:
            raise EnoughError
        workers = [resident(child.pid or 0) for child in multiprocessing.active_children()]
        self.seen.append((time.perf_counter(), resident(), max(workers, default=0.0)))
        return torch.zeros(len(batch["index"]), 1)


def main(root: Path, count: int = 1_300_000, classes: int = 1000) -> None:
    """One line of the table."""
    if not root.exists():
        fill(root, count, classes)
    chosen: dict[str, Any] = {"normal_class": 0, "protocol": "leave_one_out"} if classes > 1 else {}
    before, start = resident(), time.perf_counter()

    def say(what: str) -> None:
        print(f"{what}: {time.perf_counter() - start:.1f} s, {resident() - before:+.0f} MiB", flush=True)

    data = ImageFolder(str(root), memory_gb=0, calibration_fraction=0.01, eval_batch_size=32, num_workers=2, **chosen)
    data.setup("validate")
    say("listed")
    data.origin(training=True)
    say("listed, parted and named")
    detector, start = Loading(), time.perf_counter()
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    try:
        trainer.validate(detector, data, verbose=False)
    except EnoughError:
        (first, main_first, _), (_, main_warm, worker_warm) = detector.seen[0], detector.seen[WARM]
        last, main_last, worker_last = detector.seen[-1]
        workers = f"largest worker {worker_last:.0f} MiB ({worker_last - worker_warm:+.1f})"
        print(
            f"of a run, to the first batch: {first - start:.1f} s, {main_first - before:+.0f} MiB\n"
            f"batches {WARM} to {BATCHES}: {(last - first) / BATCHES * 1000:.1f} ms each, main process {main_last:.0f} "
            f"MiB ({main_last - main_warm:+.1f}), {workers}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
