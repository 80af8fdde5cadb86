"""Start the jobs of an array in the same second, on one archive, log folder, prefix-cache folder and Fisher cache.

python experiments/cluster/job_array.py OUT [--jobs 8] [--rounds 20]

Each round makes an archive in Microsoft's layout of Cats-vs-Dogs and begins with nothing else. Whole is a round in
which every job ends with status 0 and the same AUROC, has a log folder and a checkpoint of its own, all images are
unpacked, the caches hold each file once, and nothing half-made is left.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from panda_lightning.runtime.checkpoints import require_whole

FIT = """fit --model PANDA --model.backbone panda_tiny --model.adapt_stages 3 --model.prefix_cache_dir {out}/hidden
--data CatsVsDogs --data.root {out}/data --data.normal_class cat --data.image_size 32 --trainer.max_epochs 1
--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false
--trainer.logger CSVLogger --trainer.logger.save_dir {out}/runs --trainer.logger.name array"""
TRAIN, TEST = 60, 40  # images of each kind


def make_archive(path: Path) -> int:
    """Write small pictures under the names of the official archive; returns how many."""
    random = np.random.default_rng(0)
    names = [
        f"PetImages/{kind}/{n}.jpg" for kind in ("Cat", "Dog") for n in (*range(TRAIN), *range(10000, 10000 + TEST))
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            level = 90 if "Cat" in name else 150
            pixels = random.normal(level, 40, (48, 48, 3)).clip(0, 255).astype(np.uint8)
            picture = BytesIO()
            Image.fromarray(pixels).save(picture, "jpeg")
            archive.writestr(name, picture.getvalue())
        archive.writestr("readme[1].txt", "as in the official archive")
    return len(names)


def auroc(folder: Path) -> float:
    """The last AUROC in a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return float([row["val/auroc"] for row in csv.DictReader(file) if row["val/auroc"]][-1])


def one_round(out: Path, jobs: int) -> list[str]:
    """Run the jobs of a round; returns what is not whole."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "data").mkdir(parents=True)
    images = make_archive(out / "data" / "kagglecatsanddogs_5340.zip")
    env = {**os.environ, "XDG_CACHE_HOME": str(out / "cache"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "panda_lightning", *FIT.format(out=out).split()]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(jobs)
    ]
    said = [process.communicate()[0].decode() for process in running]
    faults = [text[-300:] for process, text in zip(running, said, strict=True) if process.returncode]
    if len(list((out / "data" / "PetImages").rglob("*.jpg"))) != images:
        faults.append("images are missing")
    folders = sorted((out / "runs" / "array").iterdir())
    if [f.name for f in folders] != [f"version_{n}" for n in range(jobs)]:
        faults.append(f"log folders {[f.name for f in folders]}")
    checkpoints = [next(iter(f.glob("checkpoints/*.ckpt")), None) for f in folders]
    if None in checkpoints:
        faults.append("a checkpoint is missing")
    else:
        for path in checkpoints:
            require_whole(str(path))
    if len({round(auroc(f), 6) for f in folders}) != 1:
        faults.append(f"AUROCs {[auroc(f) for f in folders]}")
    kept = [*(out / "cache").rglob("*.safetensors"), *(out / "hidden").glob("*.hidden")]
    if len(kept) != 3:  # one diagonal; hidden layers of training and test images
        faults.append(f"caches {[p.name for p in kept]}")
    faults += [f"{p} is left" for p in out.rglob(".panda-*")]
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    chosen = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    whole = 0
    for number in range(1, chosen.rounds + 1):
        found = one_round(chosen.out.absolute(), chosen.jobs)
        whole += not found
        print(f"round {number}: {'; '.join(found) if found else 'whole'}", flush=True)
    print(f"{whole} of {chosen.rounds} rounds of {chosen.jobs} jobs were whole")
    sys.exit(whole < chosen.rounds)
