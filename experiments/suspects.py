"""What `panda suspects` finds: python experiments/suspects.py plant|copies ROOT [NETWORK].

ROOT holds ../shared/data unpacked (cats_vs_dogs, cifar10, mvtec, hyper_kvasir, FashionMNIST), NETWORK is a folder of
weights.

plant: anomalous images are hidden among 1,000 normal training images, 1, 2 and 5 %, five times each. Recall is the
share of them among as many of the highest scores; AUROC is that of DN2 (normalised, k = 2) on 500 + 500 test images
with the hidden images, without what the tool lists by default (5 %, with nobody looking), and without the hidden ones.

copies: how many images of real data sets have a near copy at several thresholds, and how like their originals are
copies that were mirrored, compressed, resized, made grey or brighter, or shifted.
"""

import sys
import tempfile
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from decisions import pictures
from PIL import Image, ImageEnhance, ImageOps

from panda_lightning import DN2, AnomalyDataModule, FashionMNIST
from panda_lightning.datamodules import outliers
from panda_lightning.datamodules.base import Images
from panda_lightning.pictures.layout import images_below
from panda_lightning.tools.suspects import suspects

KS = (2, 5, 20)


class Given(AnomalyDataModule):
    """Arrays of images as a data set."""

    classes = ("normal", "anomalous")
    default_crop = "squash"

    def __init__(self, train, normal, anomalous, leave_out=None):
        super().__init__(normal_class="normal", image_size=train.shape[1], eval_batch_size=64, leave_out=leave_out)
        self.train, self.test = train, np.concatenate([normal, anomalous])
        self.targets = np.repeat(np.array([0, 1]), [len(normal), len(anomalous)])

    def read(self, split):
        """Normal images to train on; normal ones, then anomalous ones, to score."""
        if split == "train":
            return Images(self.train, np.zeros(len(self.train), dtype=np.int64))
        return Images(self.test, self.targets)


def auroc(network, data) -> float:
    """DN2's."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                             default_root_dir=folder)  # fmt: skip
        return trainer.test(DN2(network, normalize=True), data, verbose=False)[0]["test/auroc"]


def cifar(root: Path, name: str, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Normal images of a class, and those of all others."""

    def read(files):
        return np.stack([np.asarray(Image.open(f).convert("RGB").resize((side, side))) for f in files])

    folders = sorted((root / "cifar10/test").iterdir())
    normal = images_below(root / "cifar10/train" / name)[:1000] + images_below(root / "cifar10/test" / name)[:500]
    return read(normal), read([f for folder in folders if folder.name != name for f in images_below(folder)[:111]])


def plant(root: Path, network: str) -> None:
    """The table of hidden anomalies."""
    sets = {"cats, dogs hidden": pictures(root, "cats"), "CIFAR-10 ships": cifar(root, "ship"),
            "CIFAR-10 horses": cifar(root, "horse")}  # fmt: skip
    print("| data | hidden | recall at k = 2, 5, 20 | AUROC with them | listed 5 % left out | they alone left out |")
    print("|---|---|---|---|---|---|")
    for name, (normal, anomalous) in sets.items():
        for count in (10, 20, 50):
            found = []
            for seed in range(5):
                rng = np.random.default_rng(seed)
                rows, others = rng.permutation(len(normal)), rng.permutation(len(anomalous))
                train = np.concatenate([normal[rows[: 1000 - count]], anomalous[others[:count]]])
                test = normal[rows[1000:1500]], anomalous[others[count : count + 500]]
                recall, lists = [], {}
                for k in KS:
                    order = [int(row["path"]) for row in suspects(Given(train, *test), network, k)]
                    recall.append(np.mean(np.array(order[:count]) >= 1000 - count))
                    lists[k] = order[:50]
                with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
                    file.write("\n".join(map(str, lists[5])))
                    file.flush()
                    cleaned = auroc(network, Given(train, *test, leave_out=file.name))
                pure = auroc(network, Given(train[: 1000 - count], *test))
                found.append([*recall, auroc(network, Given(train, *test)), cleaned, pure])
            mean = np.mean(found, axis=0)
            print(f"| {name} | {count / 10:g} % | {mean[0]:.2f}, {mean[1]:.2f}, {mean[2]:.2f} | "
                  + " | ".join(f"{value:.4f}" for value in mean[3:]) + " |", flush=True)  # fmt: skip


def changed(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Copies that are not quite the same."""
    image, side, file = Image.fromarray(picture), len(picture), BytesIO()
    image.save(file, "JPEG", quality=30)
    copies = {
        "JPEG 30": Image.open(file).convert("RGB"),
        "mirrored": ImageOps.mirror(image),
        "half the size": image.resize((side // 2, side // 2)).resize((side, side)),
        "grey": image.convert("L").convert("RGB"),
        "10 % brighter": ImageEnhance.Brightness(image).enhance(1.1),
        "shifted by 1/32": Image.fromarray(np.roll(picture, side // 32, axis=1)),
    }
    return {name: np.asarray(copy) for name, copy in copies.items()}


def copies(root: Path) -> None:
    """The table of near copies."""

    def read(folder, count, side, odd=0):
        files = [f for f in images_below(root / folder) if f.stat().st_size > odd][:count]
        return np.stack([np.asarray(Image.open(f).convert("RGB").resize((side, side))) for f in files])

    shirts = np.asarray(FashionMNIST(str(root), normal_class=6).normal_images.sources)[:2000]
    sets = {
        "cats": read("cats_vs_dogs/PetImages/Cat", 1000, 128), "birds": read("cifar10/train/bird", 2000, 32),
        "airplanes": read("cifar10/train/airplane", 2000, 32), "bottle": read("mvtec/bottle/train", 500, 128),
        "leather": read("mvtec/leather", 50, 128),
        "polyps": read("hyper_kvasir/segmented-images/images", 100, 128),
        "shirts": np.repeat(shirts[..., None], 3, -1) if shirts.ndim == 3 else shirts,
    }  # fmt: skip
    levels = (0.9, 0.95, 0.97, 0.98, 0.99)
    print(f"| data | images | with a near copy at {', '.join(map(str, levels))} | found at .97 of 100 copies |")
    print("|---|---|---|---|")
    for name, pixels in sets.items():
        images = Images(pixels, np.zeros(len(pixels), dtype=np.int64))
        numbers, found = [], {}
        for outliers.TWINS in levels:
            numbers.append(len({row for pair in outliers.near_copies(images) for row in pair[:2]}))
        outliers.TWINS = 0.97
        of_each: dict[str, list[np.ndarray]] = {}
        for picture in pixels[:100]:
            for change, copy in changed(picture).items():
                of_each.setdefault(change, []).append(copy)
        for change, several in of_each.items():
            others = Images(np.stack(several), np.zeros(len(several), dtype=np.int64))
            pairs = {pair[:2] for pair in outliers.near_copies(images, others)}
            found[change] = sum((i, i) in pairs for i in range(len(several)))
        cells = ", ".join(f"{change} {number}" for change, number in found.items())
        print(f"| {name} | {len(pixels)} | {', '.join(map(str, numbers))} | {cells} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plant(Path(sys.argv[2]), sys.argv[3]) if sys.argv[1] == "plant" else copies(Path(sys.argv[2]))
