"""Outliers from Tiny-ImageNet: python experiments/tiny_outliers.py TINY OUT [LIST.yaml | --all].

TINY holds a folder a synset. Those that LIST names, by default studies/cifar10_synsets.yaml, show a class of the test
images: only --all takes them too. OUT becomes a folder of links; or, if it ends in .npy, an array of the pictures at
32 px, as small as CIFAR's: else a detector may learn that outliers are the sharper pictures.
"""

import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

if __name__ == "__main__":
    tiny, out = (Path(word) for word in sys.argv[1:3])
    (which,) = sys.argv[3:] or [Path(__file__).with_name("studies") / "cifar10_synsets.yaml"]
    named = {} if which == "--all" else yaml.safe_load(Path(which).read_text("utf-8"))
    shared = {synset for synsets in named.values() for synset in synsets}
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
