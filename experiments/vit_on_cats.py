"""Mechanics of adapting a DINOv3 ViT-S to cats, with random weights, so that no figure says how good it would be.

    python experiments/vit_on_cats.py CATS_FOLDER

200 cats at 112 px, five epochs, the last two blocks; each kind of adaptation with the Fisher information of features.
Printed: what is trained, loss terms before and after, EWC's share, and how far the weights went.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import timm
import torch
from safetensors.torch import save_file

from panda_lightning import PANDA, ImageFolder

ARCHITECTURE = "vit_small_patch16_dinov3"


def network(folder):
    """Random weights in a folder as timm has it; layer scale 1, for a fresh block does next to nothing."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE)
    for name, p in model.named_parameters():
        if "gamma" in name:
            torch.nn.init.ones_(p)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 256, 256], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 0}
    (folder / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE, "pretrained_cfg": cfg}), "utf-8")
    return f"local-dir:{folder}"


class Log(pl.Callback):
    """Loss terms by epoch."""

    def __init__(self):
        self.rows = []

    def on_train_epoch_end(self, trainer, pl_module):
        """Keep what was logged."""
        self.rows.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def main(cats):
    """Print a row a kind."""
    with tempfile.TemporaryDirectory() as work:
        backbone, root = network(Path(work, "net")), Path(work, "images")
        files = sorted(Path(cats).glob("*.jpg"))
        for split, some in (("train", files[:200]), ("test", files[200:240])):
            for i, file in enumerate(some):  # half of the test images are called anomalous: AUROC means nothing here
                place = root / split / ("cat" if split == "train" or i % 2 else "other")
                place.mkdir(parents=True, exist_ok=True)
                (place / file.name).symlink_to(file.resolve())
        print("| adapt | trained | compactness, epoch 1 | epoch 5 | EWC, epoch 5 | distance of weights |")
        print("|---|---|---|---|---|---|")
        for adapt in ("stages", "norm", "lora"):
            pl.seed_everything(0, verbose=False)
            detector, log = PANDA(backbone, adapt=adapt, pool="both", ewc_weight=1.0, grad_clip=0.1), Log()
            data = ImageFolder(root=str(root), normal_class="cat", image_size=112, crop="squash")
            trainer = pl.Trainer(
                max_epochs=5, accelerator="cpu", logger=False, callbacks=[log], enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                default_root_dir=work,
            )  # fmt: skip
            trainer.fit(detector, data)
            count = sum(p.numel() for p in detector.backbone.trained().values())
            first, last = log.rows[0], log.rows[-1]
            values = (first["train/compactness"], last["train/compactness"], last["train/ewc"])
            row = (adapt, f"{count:,}", *(f"{v:.4g}" for v in values), f"{last['train/distance_from_start']:.3g}")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
