"""Find defects within pictures with PatchCore, and draw where they are.

    python examples/03_find_defects.py                                      # pictures that the example draws
    python examples/03_find_defects.py data/bottles --backbone wide_resnet50_2 --image-size 224

FOLDER holds train/good, test/good and test/<defect>. Masks are optional: a mask has the name of its test picture and
lies in ground_truth/<defect>. Without masks there is no pixel AUROC.

It takes about 10 s on two CPU cores, and prints at the end, after a table with test/pixel_auroc 0.9883:

    The most anomalous test pictures:
      runs/plates/test/scratch/07.png: score 8.904, most anomalous at x=45, y=44
      ...
    Drawn in runs/find_defects/version_0/defects.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytorch_lightning as pl
from PIL import Image, ImageDraw
from pytorch_lightning.loggers import CSVLogger

from panda_lightning import ImageFolder, PatchCore


def draw_plates(folder: Path) -> Path:
    """Draw rough grey plates, some with a scratch, and masks of the scratches."""
    rng = np.random.default_rng(0)
    (folder / "ground_truth/scratch").mkdir(parents=True, exist_ok=True)
    for kind, count in (("train/good", 24), ("test/good", 10), ("test/scratch", 10)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rough = rng.normal(150, 15, (32, 32)).clip(0, 255).astype("uint8")
            plate = Image.fromarray(rough).resize((128, 128))
            if kind == "test/scratch":
                mask = Image.new("L", plate.size)
                line = rng.integers(20, 108, 4).tolist()
                ImageDraw.Draw(plate).line(line, fill=90, width=3)
                ImageDraw.Draw(mask).line(line, fill=255, width=3)
                mask.save(folder / f"ground_truth/scratch/{i:02d}.png")
            plate.save(folder / kind / f"{i:02d}.png")
    return folder


def main() -> None:
    """Test PatchCore, then draw the maps of the most anomalous test pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", help="your pictures; by default the example draws some")
    parser.add_argument("--backbone", default="panda_tiny", help="a timm network, such as wide_resnet50_2")
    parser.add_argument("--image-size", type=int, default=128)
    args = parser.parse_args()

    pl.seed_everything(0)
    folder = Path(args.folder) if args.folder else draw_plates(Path("runs/plates"))
    data = ImageFolder(root=str(folder), image_size=args.image_size)
    detector = PatchCore(args.backbone)
    trainer = pl.Trainer(logger=CSVLogger("runs", "find_defects"))
    trainer.test(detector, data)

    result = detector.score(folder / "test", map_size="original")  # maps have the pixels of the files
    highest = max(values.max() for values in result.maps)
    _, axes = plt.subplots(2, 4, figsize=(10, 5))
    print("\nThe most anomalous test pictures:")
    for column, i in enumerate((-result.score).argsort()[:4]):
        y, x = np.unravel_index(result.maps[i].argmax(), result.maps[i].shape)
        print(f"  {result.names[i]}: score {result.score[i]:.3f}, most anomalous at x={x}, y={y}")
        axes[0, column].imshow(Image.open(result.names[i]).convert("RGB"))
        axes[1, column].imshow(result.maps[i], vmin=0, vmax=highest)
    plt.savefig(f"{trainer.log_dir}/defects.png")
    print(f"Drawn in {trainer.log_dir}/defects.png")


if __name__ == "__main__":
    main()
