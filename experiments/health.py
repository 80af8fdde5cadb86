"""Do numbers without labels tell when to stop? python experiments/health.py run|judge ROOT OUT [NETWORK].

ROOT holds ../shared/data unpacked, NETWORK is a folder of weights. `run` trains far past the useful point on eight data
sets, each without EWC and with two forms of it, and keeps AUROC and `features/*` of every epoch, one JSON file a run;
what is there is not run again. `judge` looks on the first four data sets for the number that says most about AUROC, and
for the rule that stops best; then it tries that rule on the other four.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from curve import fit
from scipy.stats import spearmanr

from panda_lightning import PANDA, Digits, FashionMNIST, ImageFolder

PHOTOS = {"image_size": 96, "crop": "squash", "train_limit": 800, "test_limit": 800}
FOUND_ON, TRIED_ON = ("cats", "airplane", "bird", "digits"), ("ship", "horse", "shirt", "truck")
VARIANTS = {"none": ("ones", 0.0), "ones:15": ("ones", 15.0), "target:100": ("auto", 100.0)}


def data(root: Path, name: str):
    """A data set, the network (None is the one given), epochs and grad_clip."""
    if name == "digits":
        return Digits(normal_class=9, image_size=64, crop="squash", batch_size=8), "panda_tiny", 60, 1.0
    if name == "shirt":
        return FashionMNIST(str(root), normal_class=6, **PHOTOS), None, 30, 1e-2
    if name == "cats":
        from panda_lightning import CatsVsDogs

        return CatsVsDogs(str(root / "cats_vs_dogs"), normal_class="cat", on_error="skip", **PHOTOS), None, 30, 1e-2
    return ImageFolder(str(root / "cifar10"), normal_class=name, **PHOTOS), None, 30, 1e-2


def run(root: Path, out: Path, network: str) -> None:
    """Train what is missing."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*FOUND_ON, *TRIED_ON):
        for variant, (fisher, weight) in VARIANTS.items():
            path = out / f"{name}-{variant.replace(':', '-')}.json"
            if path.is_file():
                continue
            images, own, epochs, clip = data(root, name)
            detector = PANDA(own or network, ewc_weight=weight, fisher=fisher, grad_clip=clip, normalize=name != "cats")
            detector.load_backbone()
            detector.backbone.fisher_file = None  # a diagonal beside the weights would be taken
            rows = fit(detector, images, epochs)
            path.write_text(json.dumps({"data": name, "variant": variant, "rows": rows}, indent=0) + "\n")


def series(rows, name: str) -> np.ndarray:
    """A number over the epochs; of features' numbers relative to the first, where that is no share."""
    values = np.array([row.get(name, np.nan) for row in rows])
    return values if name.endswith(("kept", "share", "auroc")) else values / values[np.isfinite(values)][0]


NUMBERS = (
    "features/effective_rank", "features/variance", "features/nearest", "features/nearest_spread",
    "features/neighbours_kept", "features/ewc_share", "train/distance_from_start", "train/compactness",
)  # fmt: skip
BELOW = tuple(np.round(np.arange(0.95, 0.05, -0.05), 2))  # thresholds of the rules that are tried


def stopped(values: np.ndarray, below: float) -> int:
    """The last epoch before a number falls below a threshold."""
    fallen = np.flatnonzero(values < below)
    return max(0, int(fallen[0]) - 1) if len(fallen) else len(values) - 1


def judge(out: Path) -> None:
    """The tables."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    first, second = ([r for r in runs if r["data"] in names] for names in (FOUND_ON, TRIED_ON))
    print("| number | rank correlation with AUROC over a run's epochs: median, least to most | of their changes |")
    print("|---|---|---|")
    for name in NUMBERS:
        levels, changes = [], []
        for one in runs:
            values, auroc = series(one["rows"], name), series(one["rows"], "auroc")
            good = np.isfinite(values)
            if good.sum() > 5 and values[good].std() > 0:
                levels.append(spearmanr(values[good], auroc[good])[0])
                changes.append(spearmanr(np.diff(values[good]), np.diff(auroc[good]))[0])
        if levels:
            cells = [f"{np.median(r):+.2f}, {min(r):+.2f} to {max(r):+.2f}" for r in (levels, changes)]
            print(f"| {name} ({len(levels)} runs) | {' | '.join(cells)} |")

    def regret(some, name: str, below: float) -> np.ndarray:
        found = []
        for one in some:
            auroc, values = series(one["rows"], "auroc"), series(one["rows"], name)
            found.append(auroc.max() - auroc[stopped(values, below)])
        return np.array(found)

    def plain(some, epoch: int) -> np.ndarray:
        aurocs = [series(one["rows"], "auroc") for one in some]
        return np.array([a.max() - a[min(epoch, len(a) - 1)] for a in aurocs])

    names = [name for name in NUMBERS if name.startswith("features/") and "share" not in name and "spread" not in name]
    rules = sorted((regret(first, name, below).mean(), name, below) for name in names for below in BELOW)
    print(
        "\n| rule, chosen on "
        + ", ".join(FOUND_ON)
        + " | regret there: mean, most | regret on "
        + ", ".join(TRIED_ON)
        + " |"
    )
    print("|---|---|---|")
    for _, name, below in rules[:3]:
        cells = [f"{r.mean():.4f}, {r.max():.4f}" for r in (regret(first, name, below), regret(second, name, below))]
        print(f"| stop before {name} falls below {below:g} | {' | '.join(cells)} |")
    for epoch, label in ((0, "no training (DN2)"), (3, "3 epochs"), (10**6, "all epochs")):
        cells = [f"{r.mean():.4f}, {r.max():.4f}" for r in (plain(first, epoch), plain(second, epoch))]
        print(f"| {label} | {' | '.join(cells)} |")
    best = rules[0]
    print("\n| data | variant | AUROC before | best epoch (oracle) | where the rule stops | last |")
    print("|---|---|---|---|---|---|")
    for one in runs:
        auroc, values = series(one["rows"], "auroc"), series(one["rows"], best[1])
        stop, peak, epochs = stopped(values, best[2]), int(auroc.argmax()), [row["epoch"] for row in one["rows"]]
        cells = [one["data"], one["variant"], f"{auroc[0]:.4f}", f"{auroc[peak]:.4f} ({epochs[peak]:g})"]
        print(f"| {' | '.join([*cells, f'{auroc[stop]:.4f} ({epochs[stop]:g})', f'{auroc[-1]:.4f}'])} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        judge(Path(sys.argv[3]))
