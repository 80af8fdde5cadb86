"""How well outliers are kept apart from test images: python experiments/outlier_filter.py ROOT [PICTURES].

ROOT holds ../shared/data unpacked: cifar10, cifar100, tiny_imagenet, cats_vs_dogs and FashionMNIST. The threshold is
chosen on CIFAR-100's test images and half of Tiny-ImageNet; the rates are those of CIFAR-10, of cats and dogs, and of
the other half. PICTURES is a folder for what was left out of CIFAR-10's training images beside the nearest test image.
"""

import io
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from panda_lightning.datamodules import FashionMNIST
from panda_lightning.datamodules.outliers import SAME, _spectrum, _thumbnails, _windows, likeness
from panda_lightning.pictures.images import Images
from panda_lightning.pictures.pixels import read_rgb


def shifted(image, right, down):
    """Moved by 32nds of its side, the border repeated."""
    side = len(image)
    rows, columns = (np.clip(np.arange(side) - round(by * side / 32), 0, side - 1) for by in (down, right))
    return image[rows][:, columns]


def cropped(image, left, top, of=28):
    """A square of ``of`` 32nds of its side, as large as it was."""
    side = len(image)
    box = [round(x * side / 32) for x in (left, top, left + of, top + of)]
    return np.asarray(Image.fromarray(image).crop(box).resize((side, side), Image.Resampling.BILINEAR))


def compressed(image, quality):
    """As JPEG leaves it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(image, factor):
    """Made larger or smaller, and as large as it was."""
    side = len(image)
    there = Image.fromarray(image).resize((round(side * factor),) * 2, Image.Resampling.BILINEAR)
    return np.asarray(there.resize((side, side), Image.Resampling.BILINEAR))


def brighter(image, factor):
    """Lit otherwise, and cut off at white."""
    return (image * factor).clip(0, 255).astype(np.uint8)


def changes(rng):
    """What is promised to be found, and below what is not; each a function of an image (S, S, 3)."""

    def move(by):
        return lambda a: shifted(a, *rng.permutation([by, rng.integers(-by, by + 1)]) * rng.choice([-1, 1], 2))

    def place():
        return rng.integers(0, 5, 2)

    return {
        "identical": lambda a: a,
        "shift of 1/32": move(1),
        "shift of 2/32": move(2),
        "mirror": lambda a: a[:, ::-1],
        "crop of 28/32, middle": lambda a: cropped(a, 2, 2),
        "crop of 28/32, anywhere": lambda a: cropped(a, *place()),
        "JPEG quality 90": lambda a: compressed(a, 90),
        "JPEG quality 50": lambda a: compressed(a, 50),
        "JPEG quality 20": lambda a: compressed(a, 20),
        "twice as large and back": lambda a: resized(a, 2),
        "half as large and back": lambda a: resized(a, 0.5),
        "grey": lambda a: np.asarray(Image.fromarray(a).convert("L").convert("RGB")),
        "brightness + 10 %": lambda a: brighter(a, 1.1),
        "brightness - 10 %": lambda a: brighter(a, 0.9),
        "mirror, crop anywhere, JPEG 50": lambda a: compressed(cropped(a, *place())[:, ::-1], 50),
        "mirror, shift of 1/32, JPEG 20": lambda a: compressed(move(1)(a)[:, ::-1], 20),
        "not promised: shift of 3/32": move(3),
        "not promised: shift of 4/32": move(4),
        "not promised: crop of 30/32": lambda a: cropped(a, *rng.integers(0, 3, 2), 30),
        "not promised: crop of 26/32": lambda a: cropped(a, *rng.integers(0, 7, 2), 26),
        "not promised: crop of 24/32": lambda a: cropped(a, *rng.integers(0, 9, 2), 24),
        "not promised: turned by 5 degrees": lambda a: np.asarray(Image.fromarray(a).rotate(5, Image.BILINEAR)),
        "not promised: upside down": lambda a: a[::-1],
    }


def images(pixels):
    """An array as images of no class."""
    return Images(pixels, np.zeros(len(pixels), dtype=np.int64))


def files(folder, pattern):
    """Images of a folder, read."""
    return np.stack([np.asarray(read_rgb(path)) for path in sorted(folder.glob(pattern))])


def misses(name, test, some):
    """Print the share of changed images that would be kept."""
    rng = np.random.default_rng(0)
    print(f"\n| {name}: {len(some)} of {len(test)} test images, changed | missed | least correlation |\n|---|---|---|")
    for change, function in changes(rng).items():
        found = likeness(images(test), images(np.stack([np.ascontiguousarray(function(a)) for a in some])))
        print(f"| {change} | {np.mean(found < SAME):.2%} | {found.min():.3f} |", flush=True)


def left_out(name, test, others):
    """Print, and return, which images would be left out."""
    start = time.perf_counter(), time.process_time()
    found = likeness(images(test), images(others))
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"| {name} | {len(others)} | {np.mean(found >= SAME):.2%} | {spent[0]:.0f} | {spent[1]:.0f} |", flush=True)
    return found


def pictures(test, others, found, folder):
    """Draw 96 pairs a sheet, most alike first: what was left out, and the nearest test image."""
    rows = np.flatnonzero(found >= SAME)
    rows = rows[np.argsort(-found[rows])]
    bank = torch.cat([_windows(part) for part in _thumbnails(images(test), np.arange(len(test)))[1].split(256)])
    _, grey = _thumbnails(images(others), rows)
    nearest = []
    for queries in torch.stack([_spectrum(grey), _spectrum(grey[:, 2:30, 2:30])], dim=1):
        nearest.append(int((bank.flatten(1, 3) @ queries.T).amax(dim=(1, 2)).argmax()))
    for start in range(0, len(rows), 96):
        sheet = Image.new("RGB", (12 * 136, 8 * 72), "white")
        for k, (row, near) in enumerate(list(zip(rows, nearest, strict=True))[start : start + 96]):
            for picture, right in ((others[row], 0), (test[near], 64)):
                at = (k % 12 * 136 + right, k // 12 * 72)
                sheet.paste(Image.fromarray(picture).resize((64, 64)), at)
        sheet.save(folder / f"{start:05d}_{found[rows[start]]:.3f}.png")
    np.save(folder / "pairs.npy", np.stack([nearest, rows], axis=1))


def main(root, folder=None):
    """Print the tables."""
    cifar10, cifar100 = (files(root / name / "test", "*/*") for name in ("cifar10", "cifar100"))
    train10, train100 = (files(root / name / "train", "*/*") for name in ("cifar10", "cifar100"))
    tiny = files(root / "tiny_imagenet", "*/*.JPEG")
    cats = files(root / "cats_vs_dogs/PetImages", "*/*.jpg")
    clothes = FashionMNIST(root=str(root)).read("train").sources
    chosen = likeness(images(cifar100), images(tiny[::2]))
    shares = ", ".join(f"{x:.1%} above {np.quantile(chosen, 1 - x):.3f}" for x in (0.02, 0.01, 0.005, 0.002))
    print(f"Chosen on CIFAR-100 and half of Tiny-ImageNet: {shares}. In force: {SAME}")
    misses("Chosen on: CIFAR-100", cifar100, cifar100[::5])
    misses("CIFAR-10", cifar10, cifar10[::5])
    misses("Cats and dogs", cats[::2], cats[::10])
    print("\n| kept apart from | images | left out | s | CPU s |\n|---|---|---|---|---|")
    left_out("CIFAR-10: the other half of Tiny-ImageNet", cifar10, tiny[1::2])
    left_out("CIFAR-10: CIFAR-100, training", cifar10, train100)
    left_out("CIFAR-10: cats and dogs", cifar10, cats)
    left_out("CIFAR-10: clothes", cifar10, clothes)
    left_out("half of the cats and dogs: the other half", cats[::2], cats[1::2])
    left_out("half of the clothes: the other half", clothes[:10000], clothes[30000:])
    found = left_out("CIFAR-10: CIFAR-10, training", cifar10, train10)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        pictures(cifar10, train10, found, folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
