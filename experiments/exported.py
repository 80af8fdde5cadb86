"""Every detector as a file: python experiments/exported.py DATA WEIGHTS [ROWS], ROWS a part of a row's name.

DATA holds cats_vs_dogs (PetImages/{Cat,Dog}/n.jpg), WEIGHTS the folders resnet10t_64 and mobilenetv2_100.in1k; the
ViT's weights are random. 150 cats are the normal images (SPADE: 50, k = 10), 150 dogs the outliers; 250 cats and 250
dogs that no detector has seen are compared. Methods that learn do so for one epoch: what counts is that files agree.
Times are medians of seven steps of eight pictures of 180 x 180 pixels, from pixels to score, in turn, on two threads.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import panda_lightning as panda
from panda_lightning import ImageFolder, SampleWiseEarlyStopping
from panda_lightning.detectors.exported import from_checkpoint
from panda_lightning.pictures.layout import images_below
from panda_lightning.pictures.loose import pointed_at
from panda_lightning.tools import export

STEP, ROUNDS = 8, 7


def detectors(weights: Path, scratch: Path) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each row's detector and image size."""
    vit = scratch / "vit.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), vit)
    networks = {
        "ResNet-10t": (64, {"backbone": f"local-dir:{weights}/resnet10t_64"}),
        "MobileNetV2": (128, {"backbone": f"local-dir:{weights}/mobilenetv2_100.in1k"}),
        "ViT-Ti/16": (224, {"backbone": "vit_tiny_patch16_224", "weights": str(vit)}),
    }
    learning = {"lr": 1e-2, "grad_clip": 1.0}
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, (side, network) in networks.items():
        methods: dict[str, Callable[..., Any]] = {
            "DN2": lambda **n: panda.DN2(**n),
            "DN2, 20 centroids": lambda **n: panda.DN2(centroids=20, normalize=True, **n),
            "PANDA": lambda **n: panda.PANDA(fisher="ones", ewc_weight=1.0, **learning, **n),
            "PANDA, SES of 2": lambda **n: panda.PANDA(ewc_weight=0.0, **learning, **n),
            "MSC": lambda **n: panda.MSC(**learning, **n),
            "PANDA-OE": lambda **n: panda.PANDAOE(**learning, **n),
            "OC-SVM": lambda **n: panda.OCSVM(inputs="backbone", **n),
            "PatchCore": lambda **n: panda.PatchCore(coreset=0.1, **n),
            "SPADE": lambda **n: panda.SPADE(k=10, **n),
        }
        for method, make in methods.items():
            found[f"{method}, {name}"] = (lambda make=make, network=network: make(**network)), side
    found["Deep SVDD"] = (lambda: panda.DeepSVDD(pretrain_epochs=1)), 32
    found["Multi-Head RotNet"] = (lambda: panda.MultiHeadRotNet()), 32
    return found


def link(data: Path, scratch: Path) -> Path:
    """The folder of pictures that the rows share."""
    for target, kind, first, count in (
        ("few/train/cat", "Cat", 0, 50), ("many/train/cat", "Cat", 0, 150), ("outliers", "Dog", 0, 150),
        ("test/cat", "Cat", 10000, 250), ("test/dog", "Dog", 10000, 250),
    ):  # fmt: skip
        (scratch / target).mkdir(parents=True)
        files = (data / f"cats_vs_dogs/PetImages/{kind}/{n}.jpg" for n in range(first, first + 2 * count))
        for file in [file for file in files if file.is_file() and file.stat().st_size][:count]:
            (scratch / target / file.name).symlink_to(file.absolute())
    for root in ("few", "many"):
        (scratch / root / "test").symlink_to(scratch / "test")
    return scratch


def learned(name: str, make: Callable[[], Any], side: int, scratch: Path) -> Path:
    """The checkpoint of a row."""
    detector = make()
    data = ImageFolder(
        str(scratch / ("few" if "SPADE" in name else "many")), normal_class="cat", image_size=side, crop="squash",
        batch_size=32, test_limit=20, num_workers=0, calibration_fraction=0.2,
        outliers=str(scratch / "outliers") if "OE" in name else None,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=scratch / "runs", num_sanity_val_steps=0,
        callbacks=[SampleWiseEarlyStopping(keep_snapshots=True)] if "SES" in name else None,
    )  # fmt: skip
    if detector.learns:
        trainer.fit(detector, data)
    else:
        trainer.test(detector, data, verbose=False)
    path = scratch / "runs/checkpoints/row.ckpt"
    trainer.save_checkpoint(path)
    return path


def milliseconds(path: Path, checkpoint: Path, pictures: list[Any]) -> tuple[float, float]:
    """An image in onnxruntime and in PyTorch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = np.stack(pictures).transpose(0, 3, 1, 2)
    detector = from_checkpoint(checkpoint)
    runs = (lambda: session.run(None, {"images": batch}), lambda: detector.score(pictures, batch_size=STEP))
    found: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):
        for seconds, run in zip(found, runs, strict=True):
            start = time.perf_counter()
            run()
            if turn:  # the first is for warming up
                seconds.append(time.perf_counter() - start)
    one, other = (1000 * float(np.median(seconds)) / len(pictures) for seconds in found)
    return one, other


def main(data: Path, weights: Path, part: str = "") -> None:
    """The table."""
    print("| detector | file, MiB | largest relative difference | pairs reordered | decisions changed "
          "| ms in onnxruntime | in PyTorch | float16: MiB | difference |\n|---" + "|---" * 8 + "|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        scratch = link(data, Path(folder))
        shown = pointed_at(scratch / "test")
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in images_below(scratch / "test/dog")[:STEP]]
        for name, (make, side) in detectors(weights, scratch).items():
            if part not in name:
                continue
            checkpoint = learned(name, make, side, scratch)
            files = [scratch / f"{half}.onnx" for half in (False, True)]
            wide = export.export(checkpoint, files[0], shown)
            narrow = export.export(checkpoint, files[1], shown, half=True, tolerance=1.0)
            assert wide.images == len(shown) == 500
            sizes = [file.stat().st_size / 2**20 for file in files]
            maps = "" if wide.largest_map is None else f", maps {wide.largest_map:.0e}"
            cells = [name, f"{sizes[0]:.1f}", f"{wide.largest:.0e}{maps}", str(wide.reordered), str(wide.redecided)]
            cells += [f"{ms:.1f}" for ms in milliseconds(files[0], checkpoint, pictures)]
            maps = "" if narrow.largest_map is None else f", maps {narrow.largest_map:.0e}"
            cells += [f"{sizes[1]:.1f}", f"{narrow.largest:.0e}{maps}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            for file in files:
                file.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
