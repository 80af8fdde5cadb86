"""Long images through every view: what the centre crop does not see, and what squashing blurs.

    python experiments/strips.py ../shared/weights/mobilenetv2_100.in1k [data/mvtec]

Made-up strips of 300 x 1200 px (brushed metal with stains and scratches near both ends, where the middle square does
not reach), image AUROC by DN2 and pixel AUROC by PatchCore over all pixels of the original images. The rectangle and
the smaller of the two sizes that keep the shape have as many pixels as the square. With a second argument also bottle
and leather of MVTec AD. The strips take 95 seconds on two cores, bottle 2 minutes more.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image, ImageDraw, ImageFilter

from panda_lightning import DN2, ImageFolder, MVTecAD, PatchCore

HEIGHT, WIDTH, END = 300, 1200, 200  # pixels of a strip, and of an end where defects lie
COUNTS = {"train/good": 32, "test/good": 16, "test/defect": 16}
VIEWS: dict[str, dict[str, Any]] = {
    "center, 224": {"image_size": 224, "crop": "center"},
    "squash, 224": {"image_size": 224, "crop": "squash"},
    "squash, [112, 448]": {"image_size": [112, 448], "crop": "squash"},
    "none, 112": {"image_size": 112, "crop": "none"},
    "none, 224": {"image_size": 224, "crop": "none"},
}
SQUARES = {name: VIEWS[name] for name in ("center, 224", "squash, 224", "none, 224")}


def strip(number: int, defect: bool) -> tuple[Image.Image, Image.Image]:
    """A strip and its mask; each number another one."""
    draw = np.random.default_rng(number)
    lines = draw.normal(0, 1, (HEIGHT, WIDTH + 80)).cumsum(axis=1)
    brushed = (lines[:, 80:] - lines[:, :-80]) / 9  # of 80 px length
    shade = Image.fromarray(draw.integers(0, 256, (3, 7), dtype=np.uint8)).resize((WIDTH, HEIGHT), 3)
    grey = 120 + 9 * brushed + 0.15 * np.asarray(shade) + draw.normal(0, 3, (HEIGHT, WIDTH))
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    mask = Image.new("L", image.size, 0)
    for _ in range(int(draw.integers(1, 4)) if defect else 0):
        x, y = int(draw.integers(10, END - 50)), int(draw.integers(20, HEIGHT - 60))
        x += int(draw.integers(2)) * (WIDTH - END)
        if draw.integers(2):
            dx, dy = draw.integers(15, 40, 2).tolist()
            ImageDraw.Draw(mask).line((x, y, x + dx, y + dy), 255, 3)
        else:
            ImageDraw.Draw(mask).ellipse((x, y, x + int(draw.integers(14, 30)), y + int(draw.integers(14, 30))), 255)
    dark = Image.fromarray((np.asarray(image) * 0.72).astype(np.uint8))
    image.paste(dark, (0, 0), mask.filter(ImageFilter.GaussianBlur(1)))
    return image.convert("RGB"), mask


def make(root: Path) -> None:
    """Write the strips as ImageFolder reads them."""
    for seed, (folder, count) in enumerate(COUNTS.items()):
        for number in range(count):
            image, mask = strip(1000 * seed + number, folder.endswith("defect"))
            for place, shown in ((folder, image), ("ground_truth/defect", mask)):
                if place == folder or folder.endswith("defect"):
                    (root / place).mkdir(parents=True, exist_ok=True)
                    shown.save(root / place / f"{number:03d}.png")


def test(detector: Any, data: Any, folder: str) -> dict[str, float]:
    """Metrics of a detector that trains nothing."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder
    )
    (found,) = trainer.test(detector, data, verbose=False)
    return dict(found)


def table(name: str, views: dict[str, dict[str, Any]], data: Any, backbone: str, folder: str) -> None:
    """Print a row a view."""
    print(f"\n{name}\n\n| crop, image_size | DN2, image AUROC | PatchCore, image AUROC | pixel AUROC | PRO | seconds |")
    print("|---|---|---|---|---|---|")
    for label, view in views.items():
        start = time.perf_counter()
        plain = test(DN2(backbone, normalize=True), data(**view), folder)
        patches = test(PatchCore(backbone, coreset=0.01, map_size="original"), data(**view), folder)
        kinds = ("auroc", "pixel_auroc", "pro")
        found = [plain["test/auroc"], *(patches.get(f"test/{kind}") for kind in kinds)]  # bottle may lack its masks
        numbers = " | ".join("-" if value is None else f"{value:.4f}" for value in found)
        print(f"| {label} | {numbers} | {time.perf_counter() - start:.0f} |", flush=True)


if __name__ == "__main__":
    weights, *mvtec = sys.argv[1:]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        make(Path(work) / "strips")
        common = {"eval_batch_size": 8}
        table(
            "strips, 300 x 1200 px", VIEWS,
            lambda **view: ImageFolder(f"{work}/strips", normal_class="good", **common, **view),
            f"local-dir:{weights}", work,
        )  # fmt: skip
        for category in ("bottle", "leather") if mvtec else ():
            table(
                category, SQUARES,
                lambda category=category, **view: MVTecAD(category, root=mvtec[0], **common, **view),
                f"local-dir:{weights}", work,
            )  # fmt: skip
