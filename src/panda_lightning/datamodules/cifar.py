"""CIFAR-10 and CIFAR-100 from the official archives."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from panda_lightning.datamodules.base import AnomalyDataModule, Images, Split
from panda_lightning.datamodules.download import fetch, unpack
from panda_lightning.types import PandaError


class CIFAR10(AnomalyDataModule):
    """60,000 natural images of 32 x 32 pixels, 5,000 + 1,000 per class (Krizhevsky 2009), as official pickles.

    Expects ``root/cifar-10-batches-py/`` and downloads it if missing. Official split.
    """

    url: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    checksum: ClassVar[str] = "md5:c58f30108f718f92721af3b95e74349a"
    folder: ClassVar[str] = "cifar-10-batches-py"
    label_key: ClassVar[bytes] = b"labels"
    files: ClassVar[dict[Split, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
    }
    classes: tuple[str, ...] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    @override
    def present(self) -> bool:
        return (self.root / self.folder).is_dir()

    @override
    def obtain(self) -> None:
        unpack(fetch(self.url, self.root, self.checksum), self.root)

    @override
    def read(self, split: Split) -> Images:
        pixels, targets = [], []
        for name in self.files[split]:
            path = self.root / self.folder / name
            if not path.is_file():
                raise PandaError(f"{path} is missing: unpack {self.url} in {self.root}, or set --data.root.")
            try:
                images, labels = read_batch(path, self.label_key, len(self.classes))
            except ValueError as error:
                raise PandaError(
                    f"{path} differs from the file in {self.url} ({error}): remove {self.root / self.folder}, "
                    "and unpack the archive again."
                ) from error
            pixels.append(images)
            targets.extend(labels)
        return Images(np.concatenate(pixels), np.array(targets, dtype=np.int64))


class CIFAR100(CIFAR10):
    """CIFAR-100 with its 20 superclasses as classes, 2,500 + 500 images each (Krizhevsky 2009), as official pickles.

    Expects ``root/cifar-100-python/`` and downloads it if missing. Official split, ``coarse_labels``.
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    checksum = "md5:eb9058c3a382ffc7106e4002c42a8d85"
    folder = "cifar-100-python"
    label_key = b"coarse_labels"
    files: ClassVar[dict[Split, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    classes = (
        "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
        "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
        "large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates",
        "people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2",
    )  # fmt: skip


def read_batch(path: Path, label_key: bytes, classes: int) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Images (N, 32, 32, 3) and labels of an official pickle, of which nothing is run.

    Raises:
        ValueError: If it is none, with the reason.
    """
    with path.open("rb") as file:
        try:
            batch = _Unpickler(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ValueError(f"it cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    data, labels = (batch.get(key) for key in (b"data", label_key)) if isinstance(batch, dict) else (None, None)
    pixels = data.pixels if isinstance(data, _Array) else np.empty(0, dtype=np.uint8)
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or not len(pixels):
        raise ValueError("its data is not an array (N, 3072) of bytes")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"its {label_key.decode()} are not a list of numbers from 0 to {classes - 1}")
    if len(labels) != len(pixels):
        raise ValueError(f"it holds {len(pixels)} images and {len(labels)} labels")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _Type:
    """Stands for ``numpy.dtype``."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, _: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands for ``numpy.ndarray``, whose own unpickling believes sizes that lead it out of its memory."""

    pixels: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Type, bool, bytes]) -> None:
        _, shape, kind, fortran, data = state
        if kind.name not in ("u1", b"u1"):
            raise ValueError(f"an array is of {kind.name} instead of bytes")
        self.pixels = np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and arrays of bytes; a file that asks for anything else could run what it likes."""

    GLOBALS: ClassVar[Mapping[tuple[str, str], Callable[..., Any]]] = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),  # since NumPy 2
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes that Python 3 wrote for Python 2
    }

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which images do not need")
        return self.GLOBALS[module, name]
