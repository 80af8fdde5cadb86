"""Peak memory of PatchCore's bank and coreset against what the log says beforehand, on made-up pictures.

    python experiments/bench/memory.py [--network mobilenetv2_100] [--size 256] [--budget GIB] [--processes 2]

Random weights, on a CPU. One process a row, since peak memory is that of a process (worker processes of loaders, of
which there are none here, would not count). ``taken`` is the peak from the first image that passes the network until
the bank is there, less what the process held before (Linux). ``--budget GIB`` sets ``coreset_gb``; the log's sentence
on covering radii then follows each row. ``--processes`` shares the images; each prints what it took.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from PIL import Image

from panda_lightning import Backbone, ImageFolder, KNNIndex, PatchCore
from panda_lightning.search.coreset import Reduced, greedy_coreset, memory_for, memory_in_chunks

FOLDER = "PANDA_MEMORY_FOLDER"  # tells the other processes of a run
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ROWS = [(images, coreset) for images in (20, 60, 120, 209) for coreset in (0.01, 0.1)]


class Watched(PatchCore):
    """Writes down what memory making the bank takes."""

    def make_bank(self):
        """See PatchCore."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = held()
        bank = super().make_bank()
        self.taken = high() - before
        return bank


def held():
    """Bytes that this process holds now."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text("ascii"))[1])


def high():
    """The most since the peak began anew."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("ascii"))[1])


def pictures(folder, side, images):
    """Made-up normal and test images below a folder."""
    rng = np.random.default_rng(0)
    for kind, count in (("train/good", images), ("test/good", 1), ("test/bad", 1)):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / kind / f"{number}.png")


def row(options, folder):
    """Print one row of the table; with several processes, each prints its own."""
    torch.manual_seed(0)
    images, coreset = int(options.only[0]), float(options.only[1])
    messages = []
    log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log.addHandler(handler)
    data = ImageFolder(folder, normal_class="good", image_size=options.size, crop="squash", eval_batch_size=32)
    detector = Watched(options.network, coreset=coreset)
    detector.backbone = Backbone(timm.create_model(options.network), 0)
    if options.budget:
        detector.coreset_gb = options.budget
    run = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, devices=options.processes,
        strategy="ddp" if options.processes > 1 else "auto",
    )  # fmt: skip
    run.test(detector, data, verbose=False)
    taken, name = detector.taken / 2**20, f"{images}, process {run.global_rank}" if options.processes > 1 else images
    said = next((m for m in messages if "patches of" in m and "at most at the same time" in m), None)
    if said is None:  # which process 0 alone says
        print(f"| {name} | {coreset:g} | | | | | {taken:.1f} | | | |", flush=True)
        return
    sizes = [float(n) * UNITS[unit] / 2**20 for n, unit in re.findall(r"([\d.]+) ([KMG]iB)", said)]
    patches, choice, passing, stated = sizes[0], *sizes[-3:]
    cells = [f"{n:.1f}" for n in (patches, choice, passing, stated, taken)]
    cells += [f"{n:.2f}" for n in (choice / patches, taken / stated, taken / patches)]
    print(f"| {name} | {coreset:g} | {' | '.join(cells)} |", flush=True)
    if options.budget:
        print("\n" + next(m for m in messages if "patches chosen" in m) + "\n", flush=True)


def radii(options):
    """Print how far the farthest patch is from what greedy choice, in one and in several chunks, takes."""
    torch.manual_seed(0)
    images, coreset = int(options.radii[0]), float(options.radii[1])
    detector = PatchCore(options.network)
    detector.backbone = Backbone(timm.create_model(options.network), 0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        pictures(Path(folder), options.size, images)
        loader = ImageFolder(folder, normal_class="good", image_size=options.size, crop="squash").normal_dataloader()
        patches = torch.cat([detector.embed(batch).flatten(0, 1) for batch in loader])
    count, size = len(patches), max(1, round(coreset * len(patches)))
    heads = ("chunks", "patches and choice, MiB", "kept of chunks", "farthest patch", "/ greedy's in one", "possible")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    first = None
    for chunks in (1, 2, 3, 5):
        if chunks == 1:
            kept, needed, points = torch.arange(count), memory_for(count, patches.shape[1], 4), patches
        else:
            reduced = Reduced(size, -(-count // chunks), patches.shape[1], torch.float32, patches.device, 0)
            reduced.append(patches)
            kept, needed = reduced.finish(), memory_in_chunks(count, size, chunks, patches.shape[1], 4)
            points = patches[kept]
        picks = [torch.cat(column) for column in zip(*greedy_coreset(points, size + 1), strict=True)]
        chosen, next_one = kept[picks[0][:-1]], float(picks[1][-1]) ** 0.5
        index = KNNIndex().fit(patches[chosen])
        farthest = max(float(index.search(some, 1)[0].max()) for some in torch.split(patches, 2**14)) ** 0.5
        first = first or farthest
        print(f"| {chunks} | {needed / 2**20:.1f} | {len(kept):,} | {farthest:.2f} | {farthest / first:.2f} | ", end="")
        print(f"{next_one / 2:.2f} |" if chunks == 1 else "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="mobilenetv2_100")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs=2)
    parser.add_argument("--radii", nargs=2, metavar=("IMAGES", "CORESET"), help="instead: what chunks cost in cover")
    options = parser.parse_args()
    if options.radii:
        radii(options)
    elif options.only and FOLDER in os.environ:  # one of several processes
        row(options, os.environ[FOLDER])
    elif options.only:
        with tempfile.TemporaryDirectory() as folder:
            pictures(Path(folder), options.size, int(options.only[0]))
            os.environ[FOLDER] = folder
            row(options, folder)
    else:
        heads = ("normal images", "coreset", "patches, MiB", "with the choice", "images that pass", "stated", "taken")
        heads += ("choice / patches", "taken / stated", "taken / patches")
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
        for images, coreset in ROWS:
            words = [*sys.argv[1:], "--only", str(images), str(coreset)]
            subprocess.run([sys.executable, __file__, *words], check=True, stderr=subprocess.DEVNULL)
