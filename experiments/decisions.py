"""Are decisions at alpha right that often? python experiments/decisions.py ROOT NETWORK RESULTS.csv [SPLITS].

ROOT holds ../shared/data unpacked (cats_vs_dogs, FashionMNIST, cifar10), NETWORK is a folder of weights. The normal
images of training and test are pooled and split at random, 20 times, into 400 for training, 199 for calibration and 500
for the test; 250 anomalous images are drawn for the power. Splits share images, so each is a row. For each method and
split: false alarms and found anomalies at alpha = .01, .05 and .1, by the images held back and, for DN2 and
PANDA-Early, by leave-one-out scores of the bank. Rows that are there are not run again.
"""

import csv
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from scipy.stats import betabinom

from panda_lightning import DN2, PANDA, AnomalyDataModule, PatchCore
from panda_lightning.datamodules.base import Images
from panda_lightning.formulas.conformal import p_values
from panda_lightning.pictures.layout import images_below
from panda_lightning.pictures.view import View

ALPHAS = (0.01, 0.05, 0.1)
TRAIN, HELD, TEST, ANOMALOUS = 400, 199, 500, 250
SIDES = {"cats": 128, "Fashion-MNIST, shirts": 64, "CIFAR-10, birds": 64}
METHODS = {
    "DN2": lambda network: DN2(network, normalize=True),
    "PANDA-Early": lambda network: PANDA(network, ewc_weight=0, grad_clip=0.1),
    "PatchCore": lambda network: PatchCore(network, coreset=0.01, sigma=0),
}
EPOCHS = 3


def pictures(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All normal and anomalous images of a data set, (N, S, S, 3) each."""
    view = View(SIDES[name], "squash", SIDES[name], "bilinear")

    def read(sources):
        return np.stack([view(source).transpose(1, 2, 0) for source in sources])

    if name == "cats":
        kinds = [images_below(root / "cats_vs_dogs/PetImages" / kind) for kind in ("Cat", "Dog")]
        return tuple(read([p for p in files if p.stat().st_size][:2499]) for files in kinds)
    if name.startswith("CIFAR"):
        folders = sorted((root / "cifar10/test").iterdir())
        normal = images_below(root / "cifar10/train/bird")[:2000] + images_below(root / "cifar10/test/bird")
        return read(normal), read([p for f in folders if f.name != "bird" for p in images_below(f)[:111]])
    from panda_lightning import FashionMNIST

    data = FashionMNIST(str(root), normal_class=6)
    train, test = data.normal_images, data.test_images
    anomalous = data.is_anomalous(test.targets)
    normal = [*train.sources[:2000], *np.asarray(test.sources)[~anomalous]]
    return read(normal), read(np.asarray(test.sources)[anomalous][::9])


class Pool(AnomalyDataModule):
    """One split of the pooled images."""

    classes = ("normal", "anomalous")
    default_crop = "squash"

    def __init__(self, normal, anomalous, split: int):
        super().__init__(normal_class="normal", image_size=normal.shape[1], eval_batch_size=64, seed=split,
                         calibration_fraction=HELD / (TRAIN + HELD))  # fmt: skip
        rng = np.random.default_rng(split)
        order, others = rng.permutation(len(normal)), rng.permutation(len(anomalous))[:ANOMALOUS]
        self.train, test = normal[order[: TRAIN + HELD]], normal[order[TRAIN + HELD : TRAIN + HELD + TEST]]
        self.test = np.concatenate([test, anomalous[others]])

    def read(self, split):
        """Normal images to train on; normal ones, then anomalous ones, to score."""
        if split == "train":
            return Images(self.train, np.zeros(len(self.train), dtype=np.int64))
        return Images(self.test, np.repeat(np.array([0, 1], dtype=np.int64), [TEST, ANOMALOUS]))


def row(method: str, p: np.ndarray) -> dict[str, float]:
    """False alarms and found anomalies of one split."""
    found = {}
    for alpha in ALPHAS:
        found[f"false {alpha}"] = int((p[:TEST] <= alpha + 1e-12).sum())
        found[f"found {alpha}"] = int((p[TEST:] <= alpha + 1e-12).sum())
    counts, _ = np.histogram(p[:TEST] - 1e-9, bins=np.linspace(0, 1, 11))
    return {"method": method, **found, "deciles": " ".join(map(str, counts))}


def main(root: Path, network: str, results: Path, splits: int) -> None:
    """Run what is missing."""
    done = list(csv.DictReader(results.open(encoding="utf-8"))) if results.exists() else []
    known = {(r["data"], r["method"], int(r["split"])) for r in done}
    for name in SIDES:
        normal, anomalous = pictures(root, name)
        for split in range(splits):
            for method, make in METHODS.items():
                if (name, method, split) in known:
                    continue
                pl.seed_everything(split, verbose=False)
                detector, data = make(network), Pool(normal, anomalous, split)
                with tempfile.TemporaryDirectory() as folder:
                    trainer = pl.Trainer(accelerator="cpu", max_epochs=EPOCHS, logger=False, num_sanity_val_steps=0,
                                         enable_progress_bar=False, enable_model_summary=False,
                                         enable_checkpointing=False, default_root_dir=folder)  # fmt: skip
                    trainer.fit(detector, data) if detector.learns else trainer.test(detector, data, verbose=False)
                scores = detector.scores.score.double().numpy()
                rows = [row(method, p_values(detector.calibration.scores, scores))]
                if method != "PatchCore":  # the product refuses it to PANDA; here it is the question
                    own = detector.leave_one_out().double().numpy()
                    rows.append(row(f"{method}, leave one out", p_values(own, scores)))
                auroc = float(trainer.callback_metrics.get("val/auroc", trainer.callback_metrics.get("test/auroc")))
                with results.open("a", encoding="utf-8", newline="") as file:
                    keys = ["data", "split", "auroc", *rows[0]]
                    lines = csv.DictWriter(file, keys)
                    if not file.tell():
                        lines.writeheader()
                    lines.writerows({"data": name, "split": split, "auroc": f"{auroc:.4f}", **r} for r in rows)
    table(results)


def table(results: Path) -> None:
    """Print what came out."""
    rows = list(csv.DictReader(results.open(encoding="utf-8")))
    print("| data | method | AUROC | alpha | false alarms: mean, least to most | splits in the 99 % band | power |")
    print("|---|---|---|---|---|---|---|")
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in rows):
        own = [r for r in rows if (r["data"], r["method"]) == (data, method)]
        auroc = np.mean([float(r["auroc"]) for r in own])
        for alpha in ALPHAS:
            false = np.array([int(r[f"false {alpha}"]) for r in own])
            found = np.array([int(r[f"found {alpha}"]) for r in own])
            place = int(alpha * (HELD + 1) + 1e-9)
            low, high = betabinom.ppf([0.005, 0.995], TEST, place, HELD + 1 - place)
            within = ((false >= low) & (false <= high)).sum()
            cells = [data, method, f"{auroc:.3f}", f"{alpha:g}"]
            cells.append(f"{false.mean() / TEST:.3f}, {false.min() / TEST:.3f} to {false.max() / TEST:.3f}")
            cells += [
                f"{within} of {len(own)} ({low / TEST:.3f} to {high / TEST:.3f})",
                f"{found.mean() / ANOMALOUS:.3f}",
            ]
            print(f"| {' | '.join(cells)} |")
    print("\n| data | method | share of p-values of normal images in each tenth |\n|---|---|---|")
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in rows):
        own = [list(map(int, r["deciles"].split())) for r in rows if (r["data"], r["method"]) == (data, method)]
        shares = np.mean(own, axis=0) / TEST
        print(f"| {data} | {method} | {' '.join(f'{share:.3f}' for share in shares)} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int((sys.argv[4:] or ["20"])[0]))
