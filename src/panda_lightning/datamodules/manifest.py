"""The images that a run uses, as text: a split that follows a rule of ours can so be compared and found again."""

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from panda_lightning.datamodules.base import AnomalyDataModule, Split


def manifest(data: "AnomalyDataModule", splits: "Sequence[Split]" = ("train", "test")) -> str:
    r"""List the images of the protocol, in their order, as CSV.

    Args:
        data: A data set whose files are there.
        splits: Which splits, in this order.

    Returns:
        Lines ``file,split,label`` ending in ``\n``, the heading first; file is relative to ``data.root`` with forward
        slashes, or the row number in the split where images are an array; label is 1 for anomalous.

    Raises:
        PandaError: If a split cannot be read, or has no images of the normal class.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("file", "split", "label"))
    for split in splits:
        images = data.normal_images if split == "train" else data.test_images
        labels = data.is_anomalous(images.targets).astype(int).tolist()
        rows = range(len(images)) if images.rows is None else images.rows
        names = [
            relative(source, data.root) if isinstance(source, Path) else str(row)
            for source, row in zip(images.sources, rows, strict=True)
        ]
        lines.writerows((name, split, label) for name, label in zip(names, labels, strict=True))
    return text.getvalue()


def checksum(text: str) -> str:
    """SHA-256 of a manifest, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def relative(path: Path, root: Path) -> str:
    """A file's name below the data set's folder, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()
