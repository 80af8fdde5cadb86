"""Pack CIFAR-10 as images in folders into the official pickles: python experiments/pack_cifar10.py FOLDER DATA.

FOLDER holds {train,test}/<class>/*.jpg, as `../shared/data/unpack` leaves them (JPEG, so a little below the official
pixels); DATA then has cifar-10-batches-py, for --data.root DATA.
"""

import pickle
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from panda_lightning.datamodules import CIFAR10


def packed(paths):
    """Pixels (N, 3072) and labels of images in folders of their classes."""
    rows = [np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).reshape(-1) for path in paths]
    return {b"data": np.stack(rows), b"labels": [CIFAR10.classes.index(path.parent.name) for path in paths]}


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2]) / CIFAR10.folder
    target.mkdir(parents=True, exist_ok=True)
    for split, names in CIFAR10.files.items():
        paths = sorted((source / split).glob("*/*.jpg"))
        for name, part in zip(names, np.array_split(np.arange(len(paths)), len(names)), strict=True):
            (target / name).write_bytes(pickle.dumps(packed([paths[i] for i in part])))
        print(f"{split}: {len(paths)} images in {len(names)} files")
