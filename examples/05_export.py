"""Write a detector to one ONNX file, and score pictures with it beside the detector.

    python examples/05_export.py                                            # DN2; handwritten nines are normal
    python examples/05_export.py runs/own_folder/version_0/checkpoints/last.ckpt photos/*.jpg

It needs `pip install 'panda-lightning[export]'`. The checkpoint is of PANDA. The file includes resizing, and runs where
neither panda-lightning nor torch is installed: see onnx_score.py. `panda export` does the same on the command line.

It takes about 20 s on two CPU cores, and prints at the end:

    44 pictures (generated) agree in onnxruntime 1.32.0: largest relative difference of scores 1.2e-06 (tolerance ...

      detector       file
       8.63421    8.63421
       5.34198    5.34198
       6.29643    6.29644
       ...
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import pytorch_lightning as pl
from PIL import Image, ImageOps
from pytorch_lightning.loggers import CSVLogger

from panda_lightning import DN2, PANDA, Digits
from panda_lightning.tools.export import export


def make_detector() -> tuple[DN2, Path]:
    """DN2 with a bank of nines, and the checkpoint that its test saves."""
    detector = DN2("panda_tiny")
    trainer = pl.Trainer(logger=CSVLogger("runs", "export"))
    trainer.test(detector, Digits(normal_class="9", image_size=64))
    return detector, Path(trainer.log_dir) / "checkpoints/last.ckpt"


def main() -> None:
    """Export a detector, and print the scores of both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", type=Path, help="by default the example makes one on digits")
    parser.add_argument("pictures", nargs="*", type=Path, help="files to score; needed with a checkpoint")
    args = parser.parse_args()

    if args.checkpoint:
        detector, checkpoint = PANDA.load_from_checkpoint(args.checkpoint), args.checkpoint
        pictures = [ImageOps.exif_transpose(Image.open(path)) for path in args.pictures]
    else:
        detector, checkpoint = make_detector()
        pictures = [Image.fromarray(pixels) for pixels in Digits().read("test").sources[:8]]
    pictures = [picture.convert("RGB") for picture in pictures]

    output = checkpoint.with_name("detector.onnx")
    print(export(checkpoint, output).words())  # it compares the file with the detector before it keeps it

    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    print("\n  detector       file")
    for picture, score in zip(pictures, detector.score(pictures).score, strict=True):
        image = np.asarray(picture).transpose(2, 0, 1)[None]  # (1, 3, height, width), uint8
        (found,) = session.run(["score"], {"images": image})
        print(f"{score:10.5f} {found.item():10.5f}")


if __name__ == "__main__":
    main()
