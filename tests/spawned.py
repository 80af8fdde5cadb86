"""A fit in processes that end with it, as notebooks have them: what is the object in hand worth afterwards?"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

import panda_lightning as panda
from tests.ranks import ADAPT, data


def trainer(out, **options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, default_root_dir=out, max_epochs=2, **options,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for strategy in ("auto", "ddp_spawn"):
        pl.seed_everything(0, verbose=False)
        detector = panda.PANDA(**ADAPT, ewc_weight=100, fisher="ones")
        trainer(out, devices=1 if strategy == "auto" else 2, strategy=strategy).fit(detector, data(root))
        fitted = detector.scores.score
        trainer(out).test(detector, data(root), verbose=False)  # by the object in hand, in this process
        found[strategy] = {"fit": fitted, "test": detector.scores.score, "centre": detector.centre}
    torch.save(found, out / "spawned.pt")
