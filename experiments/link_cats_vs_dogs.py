"""Lay Cats-vs-Dogs out as an image folder of links: train n = 0..1499, test n = 10000..10499 of both classes.

    python experiments/link_cats_vs_dogs.py PETIMAGES data/cats_vs_dogs_small

PETIMAGES is Microsoft's folder with Cat/ and Dog/ in it. Only the classes' training folders differ from the
project's own Cats-vs-Dogs split, which trains on n < 10000.
"""

import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """Make the links and print how many each folder holds."""
    for name in ("Cat", "Dog"):
        for split, numbers in (("train", range(1500)), ("test", range(10000, 10500))):
            folder = target / split / name.lower()
            folder.mkdir(parents=True, exist_ok=True)
            for n in numbers:
                file = (source / name / f"{n}.jpg").resolve()
                link = folder / f"{n:05d}.jpg"
                if file.is_file() and not link.is_symlink():
                    link.symlink_to(file)
            print(folder, sum(1 for _ in folder.iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
