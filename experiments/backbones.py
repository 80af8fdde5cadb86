"""Which small backbone shows what adaptation is worth: DN2 and PANDA on small images, for several networks.

    python experiments/backbones.py data NAME [NAME ...] [--epochs 6] [--clip 1e-3]

NAME as model.backbone, `data` a folder with CIFAR-10 and Fashion-MNIST. 64 px; 1,500 training images a class, 3,000
(Fashion-MNIST) or 2,000 (CIFAR-10) test images, evenly spaced; digits with batches of 8. Each cell: AUROC of the
untrained network -> after the last epoch of Early, for raw and for L2-normalised scoring.
"""

import argparse
import logging

from curve import fit

from panda_lightning import CIFAR10, PANDA, Digits, FashionMNIST

SMALL = {"image_size": 64, "crop": "squash", "train_limit": 1500}
TASKS = [
    *((Digits, {"normal_class": c, "image_size": 64, "crop": "squash", "batch_size": 8}) for c in (1, 8, 9)),
    *((FashionMNIST, {"normal_class": c, "test_limit": 3000, **SMALL}) for c in ("T-shirt/top", "Sandal")),
    *((CIFAR10, {"normal_class": c, "test_limit": 2000, **SMALL}) for c in ("airplane", "bird", "horse")),
]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--clip", type=float, default=1e-3)
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.disable(logging.INFO)
    rows = []
    for kind, arguments in TASKS:
        where = {} if kind is Digits else {"root": options.data}
        cells = [f"{kind.__name__} {arguments['normal_class']}"]
        for name in options.names:
            for normalize in (False, True):
                settings = {"grad_clip": options.clip, "prefix_cache_dir": "data/cache", "ewc_weight": 0}
                detector = PANDA(name, normalize=normalize, **settings)
                found = [row["auroc"] for row in fit(detector, kind(**{**where, **arguments}), options.epochs)]
                cells.append(f"{found[0]:.4f} -> {found[-1]:.4f}")
        rows.append("| " + " | ".join(cells) + " |")
    heads = [f"{name}, {how}" for name in options.names for how in ("raw", "normalised")]
    print("\n".join(["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|", *rows]))


if __name__ == "__main__":
    main()
