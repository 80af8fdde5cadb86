"""Every detector once, in as many processes as the environment says: what test_distributed.py compares."""

import os
from contextlib import nullcontext

import pytorch_lightning as pl
import torch
from PIL import Image

import panda_lightning as panda
from panda_lightning.callbacks import Report, SampleWiseEarlyStopping
from tests.conftest import SMALL, make_clouds, make_folder, make_mixed, small_network
from tests.played import nccl


class Table(panda.DN2):
    """Features that do not depend on how images are batched: the pixels of a thumbnail."""

    def embed(self, batch):
        pixels = batch["image"].double()
        return torch.nn.functional.avg_pool2d(pixels, 4).flatten(1).float()


class Log(pl.Callback):
    """All metrics of each validation and epoch."""

    def __init__(self):
        self.rows = []

    def keep(self, trainer, pl_module):
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if "seconds" not in name}
        self.rows.append(found)

    on_validation_end = on_train_epoch_end = on_test_end = keep


def data(root, folder="images", outliers=None, **options):
    own = {"normal_class": "spot", "image_size": 32, "crop": "squash", "batch_size": 6, "eval_batch_size": 4}
    others = outliers and str(root / outliers)
    return panda.ImageFolder(root=str(root / folder), outliers=others, **{**own, **options})


STEPS = {"lr": 0.1, "grad_clip": 1.0}
ADAPT = {"backbone": "panda_tiny", **STEPS}
SEVERAL = {"folder": "mixed", "crop": "none"}
LENET = {"network": "cifar10", "lr": 1e-3, "pretrain_epochs": 2, "pretrain_milestone": 2, "milestone": 9}

# name -> epochs (0: test), the detector given a folder for caches, options of the data
CASES = {
    "PANDA, SES": (2, lambda cache: panda.PANDA(**ADAPT, ewc_weight=100, fisher="ones", prefix_cache_dir=cache), {}),
    "PANDA, ViT": (2, lambda cache: panda.PANDA("vit", **STEPS, ewc_weight=100, prefix_cache_dir=cache), {}),
    "PANDA, DINOv3": (2, lambda cache: panda.PANDA("eva", **STEPS, ewc_weight=100, prefix_cache_dir=cache), {}),
    "PANDA, LoRA": (2, lambda cache: panda.PANDA("eva", **STEPS, ewc_weight=1e4, adapt="lora", lora_rank=2), {}),
    "PANDA, schedule": (9, lambda cache: panda.PANDA(**ADAPT, ewc_weight=0, schedule=0.7, shard_bank=True), {}),
    "PANDA, several sizes": (2, lambda cache: panda.PANDA("panda_tiny", **STEPS, ewc_weight=0), SEVERAL),
    "PatchCore, several sizes": (0, lambda cache: panda.PatchCore("panda_tiny", coreset=0.5), SEVERAL),
    "DN2": (0, lambda cache: panda.DN2("panda_tiny", normalize=True), {}),
    "DN2, sharded": (0, lambda cache: panda.DN2("panda_tiny", normalize=True, shard_bank=True), {}),
    "PANDA, SES, sharded": (2, lambda cache: panda.PANDA(**ADAPT, ewc_weight=100, fisher="ones", shard_bank=True), {}),
    "equal features, sharded": (0, lambda cache: Table("panda_tiny", k=7, shard_bank=True), {}),
    "equal features": (0, lambda cache: Table("panda_tiny", k=7), {}),
    "MSC": (2, lambda cache: panda.MSC("panda_tiny", lr=0.01), {}),
    "PANDA-OE": (2, lambda cache: panda.PANDAOE(**ADAPT), {"outliers": "others"}),
    "Deep SVDD": (4, lambda cache: panda.DeepSVDD(**LENET), {}),
    "Deep SVDD, soft": (4, lambda cache: panda.DeepSVDD(**LENET, boundary="soft", nu=0.5, warm_up=1), {}),
    "RotNet": (2, lambda cache: panda.MultiHeadRotNet(depth=10, width=1), {}),
    "OC-SVM": (0, lambda cache: panda.OCSVM(), {}),
    "PatchCore": (0, lambda cache: panda.PatchCore("panda_tiny", coreset=0.5), {}),
    "SPADE": (0, lambda cache: panda.SPADE("panda_tiny", k=3), {}),
}
# Their BatchNorm learns and its sums are taken in another order; Adam makes whole steps of rounding where a gradient is
# next to zero. In float64 nothing of that is left to hide a mistake.
FROM_SCRATCH = ("Deep SVDD", "Deep SVDD, soft", "RotNet")


def run(root, world, name, out, where=None):
    """One case; process 0 writes down what came out.

    Args:
        root: See images.
        world: Number of processes.
        name: Of the case.
        out: The folder for it.
        where: What pl.Trainer needs for another device.
    """
    where = where or {"accelerator": "cpu", "strategy": "ddp" if world > 1 else "auto"}
    epochs, make, options = CASES[name]
    pl.seed_everything(0, verbose=False)
    log, ses = Log(), SampleWiseEarlyStopping()
    trainer = pl.Trainer(
        **where, devices=world, max_epochs=epochs or 1, logger=False,
        default_root_dir=out, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, precision="64-true" if name in FROM_SCRATCH else "32-true",
        callbacks=[log, Report(pictures=False), *([ses] if "SES" in name else [])],
    )  # fmt: skip
    detector = make(str(out / "cache") if world > 1 else None)
    if getattr(detector, "backbone_name", None) in SMALL:
        detector.backbone_name = f"local-dir:{root / detector.backbone_name}"
    if epochs:
        trainer.fit(detector, data(root, **options))
    else:
        trainer.test(detector, data(root, **options), verbose=False)
    kept = {"rows": log.rows, "score": detector.scores.score, "state": detector.state_dict(), "ses": ses.score}
    kept |= {key: getattr(detector, key, None) for key in ("centre", "radius", "steps_trained")}
    extra = kept["state"].pop("_extra_state")
    bank = extra["derived"].get("bank")
    kept["bank"] = bank if isinstance(bank, torch.Tensor) else None
    kept["part"] = len(detector.bank) if isinstance(bank, torch.Tensor) else None
    if trainer.is_global_zero:
        torch.save(kept, out / f"{name}.pt")


def images(root):
    """13 training images: three steps, the last of one image. 13 test images, 14 outliers."""
    make_folder(root / "images", train=13)
    for n in range(6):  # masks, for the detectors with maps
        path = root / f"images/ground_truth/stripe/{n:03d}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.new("L", (40, 40))
        mask.paste(255, (3 * n, 5, 3 * n + 10, 25))
        mask.save(path)
    make_clouds(root / "others", 14)
    for kind in SMALL:
        small_network(root / kind, kind)
    make_mixed(root / "mixed", train=13)
    return root


def run_all(root, out, cases):
    """Cases one after the other, as one of the processes that the environment speaks of."""
    gpus = {"accelerator": "gpu", "strategy": "ddp"} if "ON_GPU" in os.environ else None
    torch.backends.cudnn.allow_tf32 = False
    for case in cases:
        with nccl() if "PLAY_NCCL" in os.environ else nullcontext(gpus) as there:
            run(root, int(os.environ["WORLD_SIZE"]), case, out, there)
