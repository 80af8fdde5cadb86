"""The images of a protocol as a file, so that a split of ours can be compared and found again."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panda_lightning.runtime.whole import new_file


def manifest(data: Any, splits: Sequence[str] = ("train", "test")) -> str:
    r"""List the images of a data module's protocol, in their order, as CSV.

    Args:
        data: An AnomalyDataModule.
        splits: Which splits, in this order.

    Returns:
        Lines ``file,split,label`` ending in ``\n``, the heading first; file is relative to ``root`` with forward
        slashes, or the row number in the split where images are an array; label is 1 for anomalous. Training images
        that are held back have the split calibration.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("file", "split", "label"))
    held = set(data.names(data.calibration_images)) if "train" in splits else set()
    for split in splits:
        images = data.protocol_images(split)
        for name, anomalous in zip(images.names(data.root), data.is_anomalous(images.targets), strict=True):
            where = "calibration" if split == "train" and name in held else split
            lines.writerow((name, where, int(anomalous)))
    return text.getvalue()


def write_manifest(data: Any, splits: Sequence[str]) -> None:
    """Write ``manifest.csv`` into the folder of a data module's run, if it has one; every process must call it."""
    trainer = data.trainer
    folder = trainer.log_dir if trainer else None  # asks all processes
    if folder and trainer.is_global_zero:
        with new_file(Path(folder) / "manifest.csv") as part:
            part.write_text(data.manifest(splits), "utf-8")
