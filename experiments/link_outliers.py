"""Link the classes of Tiny-ImageNet that CIFAR-10 does not have: python experiments/link_outliers.py TINY OUT.

TINY holds a folder a synset. OUT gets a link to each of the 177 that studies/cifar10_synsets.yaml does not name.
"""

import sys
from pathlib import Path

import yaml

if __name__ == "__main__":
    tiny, out = map(Path, sys.argv[1:])
    named = yaml.safe_load(Path(__file__).with_name("studies").joinpath("cifar10_synsets.yaml").read_text("utf-8"))
    shared = {synset for synsets in named.values() for synset in synsets}
    out.mkdir(parents=True)
    for folder in sorted(tiny.resolve().glob("n*")):
        if folder.name not in shared:
            (out / folder.name).symlink_to(folder)
    print(f"{out}: {len(list(out.iterdir()))} classes, {len(shared)} left out")
