"""What every data set shares: the one-class protocol, the view of its images, and their loaders."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.arguments import Amount, Bounds, Checked, Count, Form, Fraction, Number, Positive, Seed, subclasses
from panda_lightning.datamodules import choices
from panda_lightning.datamodules.checks import require_images, require_training_images, say_where
from panda_lightning.datamodules.loaders import PinningLoader, ResumableLoader, ShardedSampler, to_gpu
from panda_lightning.datamodules.manifest import manifest, write_manifest
from panda_lightning.datamodules.origin import origin_of
from panda_lightning.datamodules.outliers import beside, outlier_images
from panda_lightning.pictures.images import Decoded, ImageDataset, Images, as_is, decoded
from panda_lightning.pictures.looking import looked_at
from panda_lightning.pictures.pixels import Intensity
from panda_lightning.pictures.shapes import kinds, shapes
from panda_lightning.pictures.view import Crop, View
from panda_lightning.runtime.whole import alone
from panda_lightning.runtime.work import done
from panda_lightning.types import Batch

__all__ = ["AnomalyDataModule", "Images", "Split", "View"]

Split = Literal["train", "test"]
T = TypeVar("T")
Side = Annotated[int, Bounds(1, 16384)]
Rule = Annotated[str, Form(Intensity.parse, "auto, bits:N (8 to 32) or window:LO,HI")]


class AnomalyDataModule(choices.HoldsBack, Checked, pl.LightningDataModule, ABC):
    """A labelled data set as an anomaly-detection problem: train on normal images, score all test images.

    A data set is a subclass with ``classes`` and ``read``, and also ``present`` and ``obtain`` if its files can be
    downloaded. Validation and test use the same labelled test images, as is usual in the field; their labels choose
    nothing.

    Arguments are attributes and may be changed between runs: images are then listed and decoded again. Where an
    argument of protocol or view is None, a run uses the value that the detector was trained with.

    Args:
        root: Folder of the data set's files.
        normal_class: Name or number of the normal class; if class names are numbers, a number is a name.
        protocol: one_vs_rest (the default): ``normal_class`` is normal, all others are anomalous. leave_one_out: the
            reverse.
        image_size: Side of square images in pixels (224 by default), or [height, width]; with ``crop=none`` the shorter
            side.
        crop: center (the default except for ImageFolder) scales an image by ``resize`` and crops the centre; squash
            resizes directly to the square or rectangle; none keeps each image's own shape and crops nothing. Images may
            then have different sizes, and each batch has images of one size.
        resize: For squares, the shorter side before the centre crop; None is image_size / 0.875 (256 for 224). For
            rectangles, the image is scaled until it covers resize / min(height, width) times the rectangle.
        interpolation: bilinear or bicubic; None uses the network's own.
        intensity: How to convert files with more than 8 bits per value: auto (the default) uses the range of the format
            (16 bits: 0 to 65535; floating point: 0 to 1; DICOM: its window), bits:N uses 0 to 2^N - 1, window:LO,HI
            maps LO to black and HI to white; see pictures/pixels.py.
        mask_values: Values that mark anomalous pixels in masks: grey values, or palette indices; None is all except 0.
        max_megapixels: The largest image to read, in million pixels; None is Pillow's limit, 179.
        batch_size: Images per training step, over all processes together.
        eval_batch_size: Images per step of feature extraction and scoring, on each process.
        train_limit: Keep only this many normal training images, evenly spaced; None keeps all.
        shots: Train on this many of those images, drawn by ``seed``; a smaller number gives a subset of a larger one.
        test_limit: Keep only this many test images, evenly spaced; None keeps all.
        leave_out: Training images to leave out: a text file with one path or row number per line, or a table with a
            column path, such as `panda suspects` writes.
        calibration_fraction: Share of the normal training images that is held back from training and from the bank;
            their scores turn scores into p-values (README, decisions). The choice depends on seed and file names.
        memory_gb: Decoded images are kept in memory if all fit in this many GiB on each process, otherwise they are
            read at every access. If more than 5000 files stay on disk, only 5000 are checked beforehand; ``on_error:
            skip`` checks all.
        num_workers: Worker processes for images that stay on disk; None is the number of processors, at most 8.
        on_error: raise stops and lists unreadable images; skip leaves them out and counts them.
        seed: Seed of the order of the training images.
        outliers: Images for outlier exposure: a folder, a ``.npy`` file (N, H, W, 3) uint8 such as
            300K_random_images.npy, or a data set of this project as ``CLASS:ROOT``.

    Attributes:
        COMPUTING: Arguments for where images are and how they are loaded; they change neither the selection nor the
            pixels.
        decoded: Images by split, with the settings they were made from; data modules of one class may share it.
    """

    COMPUTING = ("root", "eval_batch_size", "memory_gb", "num_workers", "accept_license", "max_megapixels")
    classes: tuple[str, ...] = ()
    default_crop: Crop = "center"
    own_split = False  # whether the split follows a rule of ours, which the run then records as a manifest

    def __init__(
        self,
        root: str = "data",
        normal_class: str | Number | None = None,
        protocol: Literal["one_vs_rest", "leave_one_out"] | None = None,
        image_size: Side | tuple[Side, Side] | None = None,
        crop: Crop | None = None,
        resize: Count | None = None,
        interpolation: Literal["bilinear", "bicubic"] | None = None,
        intensity: Rule | None = None,
        mask_values: tuple[Number, ...] | None = None,
        max_megapixels: Positive | None = None,
        batch_size: Count = 32,
        eval_batch_size: Count = 128,
        train_limit: Count | None = None,
        shots: Count | None = None,
        test_limit: Count | None = None,
        leave_out: str | None = None,
        calibration_fraction: Fraction = 0.0,
        memory_gb: Amount = 4.0,
        num_workers: Number | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        seed: Seed = 0,
        outliers: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.root = root
        self.normal_class = normal_class
        self.protocol = protocol
        self.image_size = image_size
        self.crop = crop
        self.resize = resize
        self.interpolation = interpolation
        self.intensity = intensity
        self.mask_values = mask_values
        self.max_megapixels = max_megapixels
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.train_limit = train_limit
        self.shots = shots
        self.test_limit = test_limit
        self.leave_out = leave_out
        self.calibration_fraction = calibration_fraction
        self.memory_gb = memory_gb
        self.num_workers = num_workers
        self.on_error = on_error
        self.seed = seed
        self.outliers = outliers
        self._listed: dict[str, tuple[Any, Any]] = {}  # see _once
        self.decoded: dict[str, tuple[Any, Any]] = {}
        self._shown: dict[str, ImageDataset] = {}  # of the run under way; a detector may hide its images
        self._introduced = False

    @property
    def root(self) -> Path:
        """Folder of the data set's files."""
        return self._root

    @root.setter
    def root(self, folder: str | Path) -> None:
        self._root = Path(folder).expanduser()

    @staticmethod
    def data_sets() -> dict[str, type["AnomalyDataModule"]]:
        """All data modules by the names of their classes, a user's own too."""
        return {cls.__name__: cls for cls in subclasses(AnomalyDataModule)}

    @abstractmethod
    def read(self, split: Split) -> Images:
        """List the split's images in a fixed order, and set ``classes`` where the files say them."""

    def present(self) -> bool:
        """Whether the files are there, so that nothing need be fetched or made."""
        return True

    def obtain(self) -> None:
        """Fetch the files, or make what is made of them once; one process at a time does, where they are missing."""

    @override
    def prepare_data(self) -> None:
        if not self.present():
            with alone(self.root):  # jobs that start together all find nothing
                if not self.present():
                    self.obtain()

    # ---- runs ----------------------------------------------------------------------------------------------------

    @property
    def _detector(self) -> Any:
        """The detector of the run that uses these images, or was the last to use them; None before any run."""
        trainer: Any = self.trainer
        detector = trainer.lightning_module if trainer is not None and trainer.datamodule is self else None
        return detector if hasattr(detector, "accept") else None

    def _chosen(self, name: str, default: T) -> T:
        """An argument as it was given; where it was left open, as the detector was trained, else the default."""
        given: T | None = getattr(self, name)
        if given is None and self._detector is not None:
            given = self._detector.trained_with(type(self).__name__).get(name)
        return default if given is None else given

    @staticmethod
    def _once(kept: dict[str, tuple[Any, Any]], what: str, settings: Any, make: Callable[[], T]) -> T:
        """What was made before under the same settings, else anew."""
        if what not in kept or kept[what][0] != settings:
            kept[what] = (settings, make())
        value: T = kept[what][1]
        return value

    @property
    def view(self) -> View:
        """How images are resized.

        Raises:
            PandaError: If ``resize`` is smaller than what is cut out, or ``crop=none`` has two sides.
        """
        own = getattr(self._detector, "interpolation", None) or "bilinear"
        crop = self._chosen("crop", self.default_crop)
        return View.asked(
            self._chosen("image_size", 224),
            crop,
            self._chosen("resize", None),
            self._chosen("interpolation", own),
            self.before,
            self._chosen("intensity", "auto"),
            None if self.mask_values is None else tuple(self.mask_values),
            self.max_megapixels,
            getattr(self._detector, "multiple", 1) if crop == "none" else 1,
        )

    @property
    def before(self) -> str | None:
        """What this data set does to image and mask first, see View."""
        return None

    @property
    def problem(self) -> dict[str, str]:
        """What is normal: two data modules of one class whose words differ here ask different questions."""
        return {"normal_class": self.classes[self.class_number()], "protocol": self._chosen("protocol", "one_vs_rest")}

    def origin(self, training: bool) -> dict[str, Any]:
        """What a run on these images depends on, as primitives, for the detector to keep and to compare.

        Args:
            training: Whether training images must be there; without, they are left out where they are missing.
        """
        return origin_of(self, training)

    # ---- the protocol --------------------------------------------------------------------------------------------

    def class_number(self) -> int:
        """Number of ``normal_class``.

        Raises:
            PandaError: If there is no such class.
        """
        wanted = self._chosen("normal_class", None)
        return choices.class_number(self.only_class() if wanted is None else wanted, self)

    def only_class(self) -> int | str | None:
        """The normal class where none is named, if that goes without saying."""
        return None

    def is_anomalous(self, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which class numbers (N,) the protocol calls anomalous."""
        chosen: npt.NDArray[np.bool_] = targets == self.class_number()
        return ~chosen if self._chosen("protocol", "one_vs_rest") == "one_vs_rest" else chosen

    @classmethod
    def problems(cls) -> tuple[str, tuple[str, ...]]:
        """The argument whose values make the problems of a published mean, and these; () if files say them."""
        return "normal_class", cls.classes

    @property
    def normal_images(self) -> Images:
        """The normal training images, without those that are held back."""
        return self._parted()[0]

    @property
    def test_images(self) -> Images:
        """The test images, normal and anomalous."""
        return self.protocol_images("test")

    def protocol_images(self, split: Split) -> Images:
        """The images of a split that protocol and limits leave."""
        settings = {name: getattr(self, name, None) for name in self.hparams}
        whole = self._once(self._listed, f"all {split}", settings, lambda: self.read(split))
        problem = (settings, self.problem)  # an unknown class is said before an empty one
        return self._once(self._listed, split, problem, lambda: self._limited(split, whole))

    def _limited(self, split: Split, images: Images) -> Images:
        """What protocol and limits leave of a split."""
        anomalous = self.is_anomalous(images.targets)
        if split == "train":
            images = images.take(np.flatnonzero(~anomalous))
            require_training_images(self, images)
        return choices.limited(self, split, images, anomalous)

    @override
    def setup(self, stage: str) -> None:
        self._listed, self._shown, self._introduced = {}, {}, False  # files may have changed since the last run
        require_images(self, stage, self._world)

    def manifest(self, splits: Sequence[Split] = ("train", "test")) -> str:
        """The images of the protocol as CSV, see datamodules/manifest.py."""
        return manifest(self, splits)

    def names(self, images: Images) -> list[str]:
        """What images are called: their files relative to ``root``, or their row numbers in the split."""
        return images.names(self.root)

    @override
    def teardown(self, stage: str) -> None:
        if self.own_split or self.calibration_fraction:
            write_manifest(self, [split for split in ("test", "train") if split in self._listed])
        self._shown = {}

    # ---- loaders -------------------------------------------------------------------------------------------------

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _dataset(self, what: str, images: Images, anomalous: npt.NDArray[np.bool_]) -> ImageDataset:
        """Images as a run sees them: one object for the whole run, which it may change; outside of runs a new one."""
        running = self._detector is not None and self.trainer.state.status == "running"  # type: ignore[union-attr]
        if running and not self._introduced:  # before any image is decoded, and after a checkpoint was loaded
            self._introduced = True
            self._detector.accept(self)
        if not running or what not in self._shown:
            shown = ImageDataset(self._read_pixels(what, images), anomalous, self.view)
            if not running:
                return shown
            self._shown[what] = shown
        return self._shown[what]

    def _sides(self, what: str, images: Images) -> npt.NDArray[np.int64]:
        """Heights and widths (N, 2) of images in this view."""
        made_from = (images.fingerprint(self.root, times=True), self.view)
        return self._once(self._listed, f"{what} sizes", made_from, lambda: shapes(images.sources, self.view))

    def _read_pixels(self, what: str, images: Images) -> Decoded:
        view = self.view
        files, sides = images.fingerprint(self.root, times=True), self._sides(what, images)
        size = (3 if images.masks is None else 4) * int(sides.prod(axis=1).sum())
        in_memory, skip = size <= self.memory_gb * 2**30, self.on_error == "skip"

        def read() -> Decoded:
            say_where(self, what, images, size, in_memory)
            with done("decoded", what, len(looked_at(images, in_memory, skip))):
                return decoded(images, view, in_memory, skip, f"Decoding {what} images", sides)

        made_from = (files, view, in_memory, self.on_error)
        return self._once(self.decoded, what, made_from, read)

    def steps(self, train: bool) -> int:
        """Steps over the normal training images, or the test images, on the process that has the fewest."""
        what, images = ("normal training", self.normal_images) if train else ("test", self.test_images)
        batch = self.batch_size // self._world if train else self.eval_batch_size
        sizes = kinds(self._sides(what, images))
        sampler = ShardedSampler(len(images), self._world, self._world - 1, train, self.seed, sizes, batch)
        return -(-len(sampler) // batch)

    def _loader(self, dataset: ImageDataset, train: bool = False) -> DataLoader[Batch]:
        rank = self.trainer.global_rank if self.trainer else 0
        workers = 0
        if dataset.pixels is None and dataset.hidden is None:
            workers = min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        kind = ResumableLoader if train else PinningLoader
        batch = self.batch_size // self._world if train else self.eval_batch_size
        return kind(
            dataset,
            batch_size=batch,
            sampler=ShardedSampler(len(dataset), self._world, rank, train, self.seed, dataset.kinds, batch),
            collate_fn=as_is,
            num_workers=workers,
            pin_memory=to_gpu(self.trainer),
        )

    def _normal_dataset(self) -> ImageDataset:
        images = self.normal_images
        return self._dataset("normal training", images, np.zeros(len(images), dtype=np.bool_))

    @override
    def train_dataloader(self) -> DataLoader[Batch] | CombinedLoader:
        """Normal training images in random order; with ``outliers``, beside each batch one of them.

        Batches are then ``{"normal": Batch, "outlier": Batch}``. An epoch sees every normal image once.
        """
        normal = self._loader(self._normal_dataset(), train=True)
        rank_zero_info(
            f"Each batch has {self.batch_size} images over all processes, {self.batch_size // self._world} on "
            f"each of {self._world}; an epoch has {len(normal)} batches."
        )
        return normal if self.outliers is None else beside(normal, self.outlier_dataloader())

    def normal_dataloader(self) -> DataLoader[Batch]:
        """The normal training images in order, each once over all processes: for the bank."""
        return self._loader(self._normal_dataset())

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        images = self.test_images
        return self._loader(self._dataset("test", images, self.is_anomalous(images.targets)))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def outlier_dataloader(self) -> DataLoader[Batch]:
        """Batches of ``outliers`` in random order, label 1, without what is, or nearly is, a test image.

        Raises:
            PandaError: If there is no such source.
        """
        images = outlier_images(self)
        return self._loader(self._dataset("outlier", images, np.ones(len(images), dtype=np.bool_)), train=True)
