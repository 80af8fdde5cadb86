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

import torch
from curve import fit

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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
