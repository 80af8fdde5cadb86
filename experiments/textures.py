"""Write an image folder with masks to try segmentation on: woven cloth, whole or with a defect.

    python experiments/textures.py data/cloth
    lightning test --config conf/folder.yaml --config conf/variants/patchcore.yaml --data.root data/cloth \
      --data.normal_class good --data.image_size 256 --data.crop squash --model.backbone panda_tiny

24 whole pieces to train on; 8 whole ones and 6 of each of three defects to test.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

SIDE = 256


def cloth(rng):
    """Threads of two colours over and under each other, bent and lit a little differently each time: (H, W, 3)."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    bend = gaussian_filter(rng.normal(0, 1, (2, SIDE, SIDE)), (0, 24, 24)) * 120
    u, v = (x + bend[0]) / 9, (y + bend[1]) / 9
    over = (np.floor(u) + np.floor(v)) % 2
    warp, weft = np.abs(np.sin(np.pi * u)) ** 0.6, np.abs(np.sin(np.pi * v)) ** 0.6
    light = np.where(over > 0, warp, weft) * (0.9 + 0.1 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) / SIDE)
    colours = np.where(over[..., None] > 0, (0.35, 0.45, 0.62), (0.78, 0.74, 0.65))
    return colours * light[..., None] + rng.normal(0, 0.02, (SIDE, SIDE, 3))


def stain(image, rng):
    """A dark blot with a soft edge."""
    y, x = np.mgrid[:SIDE, :SIDE]
    cy, cx = rng.uniform(40, SIDE - 40, 2)
    radius = rng.uniform(10, 22) * (1 + 0.25 * np.sin(3 * np.arctan2(y - cy, x - cx) + rng.uniform(0, 6)))
    mask = np.hypot(y - cy, x - cx) < radius
    return image * (1 - 0.45 * gaussian_filter(mask.astype(float), 2))[..., None], mask


def cut(image, rng):
    """A thin line across the threads, under which the ground shows."""
    y, x = np.mgrid[:SIDE, :SIDE]
    angle, length, (cy, cx) = rng.uniform(0, np.pi), rng.uniform(20, 45), rng.uniform(50, SIDE - 50, 2)
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    mask = (np.abs((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) < 2.5) & (np.abs(along) < length)
    return np.where(mask[..., None], 0.15, image), mask


def slub(image, rng):
    """A patch where the weave is turned by a quarter."""
    size = int(rng.uniform(24, 44))
    top, left = rng.integers(20, SIDE - 70, 2)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top : top + size, left : left + size] = True
    turned = np.rot90(image[top : top + size, left : left + size])[:, :, ::-1]
    image = image.copy()
    image[top : top + size, left : left + size] = turned
    return image, mask


def main(root):
    """Write everything; the same pictures each time."""
    rng = np.random.default_rng(0)
    for split, kind, count, damage in (
        ("train", "good", 24, None), ("test", "good", 8, None),
        ("test", "stain", 6, stain), ("test", "cut", 6, cut), ("test", "slub", 6, slub),
    ):  # fmt: skip
        for n in range(count):
            image = cloth(rng)
            if damage is not None:
                image, mask = damage(image, rng)
                path = root / "ground_truth" / kind / f"{n:03d}_mask.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(path)
            path = root / split / kind / f"{n:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
