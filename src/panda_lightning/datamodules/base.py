"""What every data set shares: the one-class protocol, and loaders that know of processes."""

import csv
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from panda_lightning.datamodules.images import ImageDataset, Images, View, as_is, relative
from panda_lightning.datamodules.outliers import apart_from, read_outliers
from panda_lightning.types import Batch, PandaError

__all__ = ["AnomalyDataModule", "Images", "ShardedSampler", "Split", "View"]

Split = Literal["train", "test"]


class ShardedSampler(DistributedSampler[int]):
    """Rows of this process: one order for any number of processes, dealt out like cards.

    Without shuffling nothing is repeated, and processes may hold different numbers of rows. With shuffling each epoch
    has its permutation, and the last round is filled up with -1, so that all processes make the same steps. (The base
    class is torch's so that Lightning leaves the sampler alone; its repeats are what this one avoids.)
    """

    def __init__(self, size: int, world: int, rank: int, shuffle: bool, seed: int = 0) -> None:
        self.size, self.world, self.rank, self.shuffle, self.seed = size, world, rank, shuffle, seed
        self.epoch = 0
        self.skip = 0  # rows of this process to leave out at the start, see ResumableLoader

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.size, generator=generator)
            order = torch.cat([order, order.new_full((-self.size % self.world,), -1)])
        return iter(order[self.rank :: self.world][self.skip :].tolist())

    def __len__(self) -> int:
        missing = self.size - self.rank
        return -(-self.size // self.world) if self.shuffle else max(0, -(-missing // self.world))


class ResumableLoader(DataLoader[Batch]):
    """A loader that goes on in the middle of an epoch: Lightning keeps its place in every checkpoint.

    Batches are drawn from the sampler when the first is asked for, not when an iterator is made, since Lightning tells
    the sampler the epoch in between.
    """

    done = 0  # batches given out in this epoch
    resumed: tuple[int, int] = (-1, 0)  # epoch, and batches given out in it before

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        epoch, done = self.resumed
        sampler: Any = self.sampler
        sampler.skip = done % len(self) * (self.batch_size or 1) if epoch == sampler.epoch else 0
        self.resumed, self.done = (-1, 0), sampler.skip // (self.batch_size or 1)
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The place in the training images' order, the same on every process."""
        sampler: Any = self.sampler
        return {"epoch": sampler.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at this place, once."""
        self.resumed = (state["epoch"], state["done"])


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
        outliers: Images for outlier exposure: a folder, a ``.npy`` file (N, H, W, 3) uint8 such as
            300K_random_images.npy, or a data set of this project as ``CLASS:ROOT``.
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
        outliers: str | None = None,
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
        self.outliers = outliers
        self._images: dict[Split, Images] = {}
        self._datasets: dict[str, ImageDataset] = {}

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

    def manifest(self, splits: Sequence[Split] = ("train", "test")) -> str:
        r"""List the images of the protocol, in their order, as CSV: a split of ours can so be compared and found again.

        Args:
            splits: Which splits, in this order.

        Returns:
            Lines ``file,split,label`` ending in ``\n``, the heading first; file is relative to ``root`` with forward
            slashes, or the row number in the split where images are an array; label is 1 for anomalous.
        """
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(("file", "split", "label"))
        for split in splits:
            images = self._split(split)
            for name, anomalous in zip(self.names(images), self.is_anomalous(images.targets), strict=True):
                lines.writerow((name, split, int(anomalous)))
        return text.getvalue()

    def names(self, images: Images) -> list[str]:
        """What images are called: their files relative to ``root``, or their row numbers in the split."""
        rows = range(len(images)) if images.rows is None else images.rows
        return [
            relative(source, self.root) if isinstance(source, Path) else str(row)
            for source, row in zip(images.sources, rows, strict=True)
        ]

    @override
    def teardown(self, stage: str) -> None:
        folder = self.trainer.log_dir if self.trainer and self.own_split else None  # asks all processes
        if self.trainer and folder and self.trainer.is_global_zero:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "manifest.csv").write_text(self.manifest(tuple(self._images)))

    # ---- loaders -------------------------------------------------------------------------------------------------

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _decoded(self, what: str, images: Images, anomalous: npt.NDArray[np.bool_]) -> ImageDataset:
        if what not in self._datasets:
            interpolation = self.interpolation or (self.trainer and _interpolation(self.trainer)) or "bilinear"
            view = View(self.image_size, self.crop, self.resize, interpolation, self.before)
            size = len(images) * 3 * self.image_size**2
            in_memory = size <= self.memory_gb * 2**30
            rank_zero_info(
                f"{type(self).__name__}: {len(images)} {what} images, {view.size} px, "
                + (f"decoded to {size / 2**20:.0f} MiB of memory" if in_memory else "read from disk at every access")
            )
            skip = self.on_error == "skip"
            self._datasets[what] = ImageDataset(images, anomalous, view, in_memory, skip, f"Decoding {what} images")
        return self._datasets[what]

    def _loader(self, dataset: ImageDataset, train: bool = False) -> DataLoader[Batch]:
        rank = self.trainer.global_rank if self.trainer else 0
        workers = 0
        if dataset.pixels is None and dataset.hidden is None:
            workers = min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        kind = ResumableLoader if train else DataLoader[Batch]
        return kind(
            dataset,
            batch_size=self.batch_size // self._world if train else self.eval_batch_size,
            sampler=ShardedSampler(len(dataset), self._world, rank, shuffle=train, seed=self.seed),
            collate_fn=as_is,
            num_workers=workers,
            pin_memory=torch.cuda.is_available() and (dataset.hidden is None or not dataset.hidden.is_cuda),
        )

    def _normal_dataset(self) -> ImageDataset:
        images = self.normal_images
        return self._decoded("normal training", images, np.zeros(len(images), dtype=np.bool_))

    @override
    def train_dataloader(self) -> DataLoader[Batch] | CombinedLoader:
        """Normal training images in random order; with ``outliers``, beside each batch one of them.

        Batches are then ``{"normal": Batch, "outlier": Batch}``. An epoch sees every normal image once.
        """
        normal = self._loader(self._normal_dataset(), train=True)
        rank_zero_info(
            f"Batches of {self.batch_size} images over all processes, {self.batch_size // self._world} on each of "
            f"{self._world}: {len(normal)} an epoch."
        )
        if self.outliers is None:
            return normal
        outlier = self.outlier_dataloader()
        mode: Any = "min_size" if len(outlier) >= len(normal) else "max_size_cycle"
        return CombinedLoader({"normal": normal, "outlier": outlier}, mode)

    def normal_dataloader(self) -> DataLoader[Batch]:
        """The normal training images in order, each once over all processes: for the bank."""
        return self._loader(self._normal_dataset())

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        images = self.test_images
        return self._loader(self._decoded("test", images, self.is_anomalous(images.targets)))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def outlier_dataloader(self) -> DataLoader[Batch]:
        """Batches of ``outliers`` in random order, label 1, without what is, or nearly is, a test image.

        Raises:
            PandaError: If there is no such source.
        """
        if self.outliers is None:
            raise PandaError(
                "outlier exposure needs images that show nothing of the test classes: set data.outliers to a folder, a "
                ".npy file such as 300K_random_images.npy, or a data set as CLASS:ROOT."
            )
        if "outlier" not in self._datasets:
            images = read_outliers(self.outliers, {cls.__name__: cls for cls in subclasses(AnomalyDataModule)})
            kept = apart_from(self.test_images, images)
            rank_zero_info(
                f"{len(images) - len(kept)} of {len(images)} outliers are test images, or nearly, and are left out"
            )
            if not len(kept):
                raise PandaError(f"data.outliers={self.outliers} holds no images besides test images: name others.")
            self._decoded("outlier", images.take(kept), np.ones(len(kept), dtype=np.bool_))
        return self._loader(self._datasets["outlier"], train=True)


def _interpolation(trainer: pl.Trainer) -> str | None:
    """The interpolation of the detector's network, if it has one."""
    backbone = getattr(trainer.lightning_module, "backbone", None)
    return getattr(backbone, "interpolation", None)


def subclasses(base: type[Any]) -> list[type[Any]]:
    """Every class below this one that has been imported."""
    direct: list[type[Any]] = base.__subclasses__()
    return [*direct, *(sub for cls in direct for sub in subclasses(cls))]
