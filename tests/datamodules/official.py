"""Data sets in their official layouts, made for the tests."""

import pickle
import struct
from pathlib import Path

import numpy as np


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its str: the official pickles are of that age."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text: bytes) -> None:
        small = len(text) < 256
        self.write((b"U" + bytes([len(text)]) if small else b"T" + struct.pack("<i", len(text))) + text)

    dispatch[bytes] = save_bytes


def write_cifar10(root: Path, images: np.ndarray, targets: np.ndarray, split: str) -> None:
    """Write (N, 32, 32, 3) uint8 images as the official pickles: five training batches, or one of test."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for name, part in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
        batch = {b"data": rows[part], b"labels": targets[part].tolist(), b"batch_label": name.encode()}
        with (folder / name).open("wb") as file:
            _Python2Pickler(file, protocol=2).dump(batch)


def make_cifar10(root: Path, train: int = 50, test: int = 20) -> None:
    """A small CIFAR-10 of noise, each class a shade of its own."""
    rng = np.random.default_rng(0)
    for split, size in (("train", train), ("test", test)):
        targets = np.arange(size) % 10
        noise = rng.integers(0, 60, (size, 32, 32, 3))
        write_cifar10(root, (noise + targets[:, None, None, None] * 19).astype(np.uint8), targets, split)
