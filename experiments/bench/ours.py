"""A fit of the package as a user has it, with CSV logger, report and checkpoint.

python experiments/bench/ours.py NETWORK IMAGES EPOCHS   prints one line of JSON, last.
"""

import json
import logging
import resource
import sys
import tempfile
import time

import pytorch_lightning as pl
import torch

from panda_lightning import PANDA, ImageFolder


class Curve(pl.Callback):
    """Keeps the AUROC of each validation."""

    def __init__(self):
        self.aurocs = []

    def on_validation_end(self, trainer, pl_module):
        """Keep it."""
        self.aurocs.append(float(trainer.callback_metrics["val/auroc"]))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        curve = Curve()
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
            max_epochs=int(sys.argv[3]),
            logger=pl.loggers.CSVLogger(folder),
            callbacks=[curve],
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = ImageFolder(root=sys.argv[2], image_size=224, crop="squash")
        trainer.fit(PANDA(f"local-dir:{sys.argv[1]}", ewc_weight=0, grad_clip=0.1, prefix_cache_gb=64), data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved() / 2**30
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_gib": peak, "aurocs": curve.aurocs}))
