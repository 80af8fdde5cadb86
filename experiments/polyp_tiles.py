"""Polyps against mucosa in tiles of the same pictures: python experiments/polyp_tiles.py HYPER_KVASIR OUT.

HYPER_KVASIR holds segmented-images/{images,masks}. Where the normal images of Hyper-Kvasir are missing, tiles without
polyp stand in for them. As datamodules/hyper_kvasir.py has it, a picture is resized to 512 px and its middle 430 px are
kept; these become nine tiles of 143 px. Of every second picture, the tiles without polyp are for training; of the
others, those without are normal test images, and those of which a twentieth or more is polyp are anomalous. The rest
is left out. OUT is laid out as a category of MVTec AD, masks included.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 143  # a third of 430

if __name__ == "__main__":
    source, out = Path(sys.argv[1]) / "segmented-images", Path(sys.argv[2])
    folders = [out / name for name in ("train/good", "test/good", "test/polyp", "ground_truth/polyp")]
    for folder in folders:
        folder.mkdir(parents=True)
    train, good, polyp, truth = folders
    for number, path in enumerate(sorted((source / "images").iterdir())):
        picture = Image.open(path).convert("RGB").resize((512, 512), Image.Resampling.BILINEAR)
        mask = Image.open(source / "masks" / path.name).convert("L").resize((512, 512), Image.Resampling.NEAREST)
        for row in range(3):
            for column in range(3):
                left, top = 45 + column * SIDE, 45 + row * SIDE
                box, name = (left, top, left + SIDE, top + SIDE), f"{path.stem}_{row}{column}"
                marked = np.asarray(mask.crop(box)) > 127
                if not marked.any():
                    picture.crop(box).save((train if number % 2 == 0 else good) / f"{name}.png")
                elif number % 2 and marked.mean() >= 0.05:
                    picture.crop(box).save(polyp / f"{name}.png")
                    Image.fromarray(marked).save(truth / f"{name}_mask.png")
    for folder in folders:
        print(folder, len(list(folder.iterdir())))
