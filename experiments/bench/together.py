"""Milliseconds a training step of PANDA takes when several runs share a device: how many --jobs of `panda table` pay.

    python experiments/bench/together.py [--backbone NAME] [--size 224] [--train 960] [--runs 1 4 8 16]

Made-up images of 32 x 32 pixels, the frozen layers' output cached, batches of 32, float32, one thread a run. Each run
has five epochs and is a process of its own; the median of epochs 2 to 4, and over runs. The first waits for libraries,
the last has validation. Without --backbone it is a ResNet-18 of random weights.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch

from panda_lightning import PANDA, ImageFolder

BATCH, EPOCHS = 32, 5


class Clock(pl.Callback):
    """When epochs begin, all work before done."""

    def __init__(self):
        self.begins = []

    def on_train_epoch_start(self, trainer, pl_module):
        """Look at the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begins.append(time.perf_counter())


def one(backbone: str, images: str, size: int) -> float:
    """Milliseconds a step of one run."""
    logging.disable(logging.WARNING)
    clock = Clock()
    trainer = pl.Trainer(
        devices=1, max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
        default_root_dir=images,
    )  # fmt: skip
    data = ImageFolder(images, image_size=size, crop="squash", batch_size=BATCH)
    trainer.fit(PANDA(backbone, ewc_weight=0), data)
    spans = [end - begin for begin, end in zip(clock.begins[1:], clock.begins[2:], strict=False)]
    return 1000 * median(spans) / data.steps(train=True)


def main() -> None:
    """Print the table, or with --one a run's number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--train", type=int, default=960)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.backbone, options.one, options.size)))
        return
    spec = spec_from_file_location("bench", Path(__file__).with_name("__main__.py"))
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    print("| runs at once | ms a step | steps a second, all together |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work, backbone = Path(folder), options.backbone
        bench.make_images(work / "images", options.train, 100)
        if backbone is None:
            bench.make_network(work / "network", "resnet18")
            backbone = f"local-dir:{work / 'network'}"
        words = [sys.executable, __file__, "--backbone", backbone, "--size", str(options.size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for runs in options.runs:
            each = [work / f"run{runs}-{number}" for number in range(runs)]
            for own in each:
                own.symlink_to(work / "images")
            started = [
                subprocess.Popen([*words, "--one", str(own)], stdout=subprocess.PIPE, text=True, env=environment)
                for own in each
            ]
            step = median(json.loads(process.communicate()[0].splitlines()[-1]) for process in started)
            print(f"| {runs} | {step:.1f} | {1000 * runs / step:.0f} |", flush=True)


if __name__ == "__main__":
    main()
