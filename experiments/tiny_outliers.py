"""Outliers for CIFAR-10 from Tiny-ImageNet: python experiments/tiny_outliers.py TINY OUT [--all].

TINY holds a folder a synset. Those that studies/cifar10_synsets.yaml names show a class of CIFAR-10: only --all takes
them too. OUT becomes a folder of links; or, if it ends in .npy, an array of the pictures at 32 px, as small as
CIFAR-10's: else a detector may learn that outliers are the sharper pictures.
"""

import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

if __name__ == "__main__":
    tiny, out = (Path(word) for word in sys.argv[1:3])
    named = yaml.safe_load(Path(__file__).with_name("studies").joinpath("cifar10_synsets.yaml").read_text("utf-8"))
    shared = set() if "--all" in sys.argv[3:] else {synset for synsets in named.values() for synset in synsets}
    folders = [folder for folder in sorted(tiny.resolve().glob("n*")) if folder.name not in shared]
    if out.suffix == ".npy":
        files = [path for folder in folders for path in sorted(folder.rglob("*.JPEG"))]
        pictures = [Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for path in files]
        np.save(out, np.stack([np.asarray(picture) for picture in pictures]))
        print(f"{out}: {len(files)} pictures of {len(folders)} classes, {len(shared)} left out")
    else:
        out.mkdir(parents=True)
        for folder in folders:
            (out / folder.name).symlink_to(folder)
        print(f"{out}: {len(folders)} classes, {len(shared)} left out")
