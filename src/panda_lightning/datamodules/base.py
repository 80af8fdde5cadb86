"""What every data set shares: the one-class protocol, decoding, resizing, and loaders that know of processes."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from PIL import Image, UnidentifiedImageError
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from panda_lightning.types import Batch, PandaError

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """One split of a data set, before any protocol.

    Attributes:
        sources: N files, or an array (N, H, W) or (N, H, W, 3) uint8.
        targets: (N,) class numbers.
        masks: N files of masks, None for an image without anomalous pixels; or None where there are no masks.
        problems: What is wrong with the files but does not prevent their use, a sentence each.
    """

    sources: Sequence[Path] | npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]
    masks: Sequence[Path | None] | None = None
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: npt.NDArray[np.int64]) -> "Images":
        """The images of these rows, in their order."""
        sources = self.sources[rows] if isinstance(self.sources, np.ndarray) else [self.sources[i] for i in rows]
        masks = None if self.masks is None else [self.masks[i] for i in rows]
        return Images(sources, self.targets[rows], masks, self.problems)


@dataclass(frozen=True)
class View:
    """How an image becomes (3, size, size) uint8.

    Attributes:
        size: Side in pixels.
        crop: center resizes the shorter side to ``resize`` and cuts the middle; squash resizes straight to a square.
        resize: See crop.
        interpolation: bilinear or bicubic.
        before: What a data set does to image and mask first, given the picture and how to resample it.
    """

    size: int
    crop: Literal["center", "squash"]
    resize: int
    interpolation: str
    before: Callable[[Image.Image, Image.Resampling], Image.Image] | None = None

    def __call__(self, source: Path | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Read and resize one image: (3, size, size)."""
        image = self._fit(read_rgb(source), Image.Resampling[self.interpolation.upper()])
        return np.asarray(image).transpose(2, 0, 1)

    def mask(self, source: Path | None) -> npt.NDArray[np.bool_]:
        """Read and resize one mask, above half grey being anomalous: (size, size); None is all normal."""
        if source is None:
            return np.zeros((self.size, self.size), dtype=np.bool_)
        mask = Image.open(source).convert("L").point(lambda grey: 255 * (grey > 127))
        return np.asarray(self._fit(mask, Image.Resampling.NEAREST)) > 0

    def _fit(self, image: Image.Image, how: Image.Resampling) -> Image.Image:
        if self.before is not None:
            image = self.before(image, how)
        if self.crop == "squash":
            return image.resize((self.size, self.size), how)
        scale = self.resize / min(image.size)
        width, height = (max(self.resize, round(side * scale)) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.resize((width, height), how).crop((left, top, left + self.size, top + self.size))


def read_rgb(source: Path | npt.NDArray[np.uint8]) -> Image.Image:
    """An RGB image: grey is repeated, an alpha channel dropped, 16 bits scaled to 8."""
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


class ImageDataset(Dataset[Batch]):
    """Resized uint8 images with label and index; decoded once into memory, or at every access.

    Args:
        images: What to read.
        anomalous: (N,) bool.
        view: How images are resized.
        in_memory: Decode everything now.
        skip_unreadable: Leave out, and count, files that are not images, instead of raising.
        title: What the progress bar says.

    Raises:
        PandaError: Naming the files that cannot be read.
    """

    def __init__(
        self,
        images: Images,
        anomalous: npt.NDArray[np.bool_],
        view: View,
        in_memory: bool,
        skip_unreadable: bool,
        title: str,
    ) -> None:
        self.view = view
        pixels: list[npt.NDArray[np.uint8]] = []
        bad: dict[int, str] = {}
        rows = range(len(images))
        # Also where images stay on disk: a file that cannot be read is named now, not in the night.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = pool.map(lambda i: _try(view, images.sources[i]), rows)
            for i, image in track(zip(rows, decoded, strict=True), title, total=len(images), transient=True):
                if isinstance(image, str):
                    bad[i] = image
                elif in_memory:
                    pixels.append(image)
        if bad:
            names = [f"{images.sources[i]} ({reason})" for i, reason in bad.items()]
            listed = "; ".join(names[:8]) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
            if not skip_unreadable or len(bad) == len(images):
                raise PandaError(
                    f"{len(bad)} of {len(images)} images cannot be read: {listed}. Mend or remove them, or set "
                    "data.on_error=skip."
                )
            rank_zero_warn(f"{len(bad)} of {len(images)} images cannot be read and are left out: {listed}")
            good = np.array([i for i in rows if i not in bad])
            images, anomalous = images.take(good), anomalous[good]
        self.images = images
        self.label = torch.from_numpy(anomalous.astype(np.int64))
        self.pixels = torch.from_numpy(np.stack(pixels)) if in_memory else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Batch:
        return self.__getitems__([row])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A whole batch at once; row -1 is a filler, shown as image 0 with index -1."""
        index = torch.tensor(rows)
        real = index.clamp(min=0)
        if self.pixels is not None:
            image = self.pixels[real]
        else:
            image = torch.from_numpy(np.stack([self.view(self.images.sources[i]) for i in real]))
        batch: Batch = {"image": image, "label": self.label[real], "index": index}
        if self.images.masks is not None:
            batch["mask"] = torch.from_numpy(np.stack([self.view.mask(self.images.masks[i]) for i in real]))
        return batch


def _try(view: View, source: Path | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | str:
    try:
        return view(source)
    except UnidentifiedImageError:
        return "empty file" if isinstance(source, Path) and not source.stat().st_size else "not an image"
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # all that Pillow raises
        return str(error)


class ShardedSampler(DistributedSampler[int]):
    """Rows of this process: one order for any number of processes, dealt out like cards.

    Without shuffling nothing is repeated, and processes may hold different numbers of rows. With shuffling each epoch
    has its permutation, and the last round is filled up with -1, so that all processes make the same steps. (The base
    class is torch's so that Lightning leaves the sampler alone; its repeats are what this one avoids.)
    """

    def __init__(self, size: int, world: int, rank: int, shuffle: bool, seed: int = 0) -> None:
        self.size, self.world, self.rank, self.shuffle, self.seed, self.epoch = (
            size,
            world,
            rank,
            shuffle,
            seed,
            0,
        )

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.size, generator=generator)
            order = torch.cat([order, order.new_full((-self.size % self.world,), -1)])
        return iter(order[self.rank :: self.world].tolist())

    def __len__(self) -> int:
        missing = self.size - self.rank
        return -(-self.size // self.world) if self.shuffle else max(0, -(-missing // self.world))


class AnomalyDataModule(pl.LightningDataModule, ABC):
    """A labelled data set as an anomaly-detection problem: normal images to train on, all test images to score.

    A data set is a subclass with ``classes`` and ``read``, and ``prepare_data`` where files can be fetched. Validation
    and test use the same labelled test images, as is the field's habit; nothing is chosen by their labels.

    Args:
        root: Folder of the data set's files.
        normal_class: Name or number of the normal class.
        protocol: one_vs_rest: that class is normal, all others are anomalous. leave_one_out: the reverse.
        image_size: Side of the square images, in pixels.
        crop: center resizes the shorter side to ``resize`` and cuts the middle; squash resizes straight to the square.
        resize: Shorter side before the centre crop; None is image_size / 0.875 (256 for 224).
        interpolation: bilinear or bicubic; None takes the network's own.
        batch_size: Images of a training step, over all processes together.
        eval_batch_size: Images of a step of extraction and scoring, on each process.
        train_limit: Keep only so many normal training images, evenly spaced; None keeps all.
        test_limit: The same for test images.
        memory_gb: Decoded images are kept in memory if all fit in so many GiB on each process, else read at every
            access.
        num_workers: Worker processes for images that stay on disk; None is the number of processors, at most 8.
        on_error: raise names unreadable images and stops; skip leaves them out and counts them.
        seed: Seed of the training images' order.
    """

    classes: tuple[str, ...] = ()
    own_split = False  # whether the split follows a rule of ours, which the run then records as a manifest
    before: Callable[[Image.Image, Image.Resampling], Image.Image] | None = None  # see View

    def __init__(
        self,
        root: str = "data",
        normal_class: int | str | None = None,
        protocol: Literal["one_vs_rest", "leave_one_out"] = "one_vs_rest",
        image_size: int = 224,
        crop: Literal["center", "squash"] = "center",
        resize: int | None = None,
        interpolation: Literal["bilinear", "bicubic"] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        train_limit: int | None = None,
        test_limit: int | None = None,
        memory_gb: float = 4.0,
        num_workers: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.root = Path(root)
        self.normal_class = normal_class
        self.protocol = protocol
        self.image_size = image_size
        self.crop = crop
        self.resize = resize or round(image_size / 0.875)
        if self.resize < image_size:
            raise PandaError(f"resize={resize} is smaller than image_size={image_size}: choose {image_size} or more.")
        self.interpolation = interpolation
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.limits: dict[Split, int | None] = {"train": train_limit, "test": test_limit}
        self.memory_gb = memory_gb
        self.num_workers = num_workers
        self.on_error = on_error
        self.seed = seed
        self._images: dict[Split, Images] = {}
        self._datasets: dict[Split, ImageDataset] = {}

    @abstractmethod
    def read(self, split: Split) -> Images:
        """List the split's images in a fixed order; called once a split, when it is needed."""

    # ---- the protocol --------------------------------------------------------------------------------------------

    def class_number(self) -> int:
        """Number of ``normal_class``.

        Raises:
            PandaError: If there is no such class.
        """
        wanted = self.normal_class
        if wanted in self.classes:
            return self.classes.index(str(wanted))
        if isinstance(wanted, str) and wanted.isdecimal():
            wanted = int(wanted)
        if isinstance(wanted, int) and 0 <= wanted < len(self.classes):
            return wanted
        listed = ", ".join(self.classes[:25]) + (", ..." if len(self.classes) > 25 else "")
        raise PandaError(
            f"normal_class={self.normal_class} is not a class of {type(self).__name__} "
            f"(0-{len(self.classes) - 1}: {listed})."
        )

    def is_anomalous(self, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which class numbers (N,) the protocol calls anomalous."""
        chosen: npt.NDArray[np.bool_] = targets == self.class_number()
        return ~chosen if self.protocol == "one_vs_rest" else chosen

    @property
    def normal_images(self) -> Images:
        """The normal training images."""
        return self._split("train")

    @property
    def test_images(self) -> Images:
        """The test images, normal and anomalous."""
        return self._split("test")

    def _split(self, split: Split) -> Images:
        if split not in self._images:
            images = self.read(split)
            self.class_number()  # an unknown class is said before an empty one
            for problem in images.problems:
                rank_zero_warn(f"{type(self).__name__}: {problem}")
            if split == "train":
                images = images.take(np.flatnonzero(~self.is_anomalous(images.targets)))
                if not len(images):
                    raise PandaError(
                        f"{type(self).__name__} has no training images of the normal class {self._normal_name}."
                    )
            limit = self.limits[split]
            if limit is not None and limit < len(images):
                images = images.take(np.linspace(0, len(images) - 1, limit).round().astype(np.int64))
            self._images[split] = images
        return self._images[split]

    @property
    def _normal_name(self) -> str:
        name = self.classes[self.class_number()]
        return name if self.protocol == "one_vs_rest" else f"all but {name}"

    @override
    def setup(self, stage: str) -> None:
        test = self.is_anomalous(self.test_images.targets)
        if stage in ("fit", "validate", "test") and (test.all() or not test.any()):
            raise PandaError(
                f"the test images of {type(self).__name__} are all {'anomalous' if test.all() else 'normal'} with "
                f"normal class {self._normal_name}: AUROC needs both kinds."
            )
        if stage == "fit" and len(self.normal_images) < 2:
            raise PandaError(
                f"{type(self).__name__} has a single training image of the normal class {self._normal_name}: "
                "give 2 or more."
            )
        if self.batch_size % self._world:
            raise PandaError(
                f"batch_size={self.batch_size} is shared by {self._world} processes: "
                f"choose a multiple of {self._world}."
            )

    # ---- loaders -------------------------------------------------------------------------------------------------

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _dataset(self, split: Split) -> ImageDataset:
        if split not in self._datasets:
            images = self._split(split)
            interpolation = self.interpolation or (self.trainer and _interpolation(self.trainer)) or "bilinear"
            view = View(self.image_size, self.crop, self.resize, interpolation, self.before)
            size = len(images) * 3 * self.image_size**2
            in_memory = size <= self.memory_gb * 2**30
            what = "normal training" if split == "train" else "test"
            rank_zero_info(
                f"{type(self).__name__}: {len(images)} {what} images, {view.size} px, "
                + (f"decoded to {size / 2**20:.0f} MiB of memory" if in_memory else "read from disk at every access")
            )
            self._datasets[split] = ImageDataset(
                images,
                self.is_anomalous(images.targets),
                view,
                in_memory,
                self.on_error == "skip",
                f"Decoding {what} images",
            )
        return self._datasets[split]

    def _loader(self, split: Split, train: bool = False) -> DataLoader[Batch]:
        dataset = self._dataset(split)
        rank = self.trainer.global_rank if self.trainer else 0
        workers = 0
        if dataset.pixels is None:
            workers = min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        return DataLoader(
            dataset,
            batch_size=self.batch_size // self._world if train else self.eval_batch_size,
            sampler=ShardedSampler(len(dataset), self._world, rank, shuffle=train, seed=self.seed),
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", train=True)

    def normal_dataloader(self) -> DataLoader[Batch]:
        """The normal training images in order, each once over all processes: for the bank."""
        return self._loader("train")

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test")

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def _as_is(batch: Any) -> Any:
    return batch


def _interpolation(trainer: pl.Trainer) -> str | None:
    """The interpolation of the detector's network, if it has one."""
    backbone = getattr(trainer.lightning_module, "backbone", None)
    return getattr(backbone, "interpolation", None)
