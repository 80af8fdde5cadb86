"""What every data set shares: the one-class protocol, the view of its images, and their loaders."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from panda_lightning.arguments import Amount, Bounds, Checked, Count, Form, Fraction, Number, Positive, Seed, subclasses
from panda_lightning.datamodules.loaders import ResumableLoader, ShardedSampler
from panda_lightning.datamodules.manifest import manifest
from panda_lightning.datamodules.outliers import outliers_apart, read_outliers
from panda_lightning.pictures.images import Images, View
from panda_lightning.pictures.loose import listed_paths
from panda_lightning.pictures.pixels import Intensity
from panda_lightning.pictures.reading import Decoded, ImageDataset, as_is, decoded
from panda_lightning.runtime.whole import alone, new_file
from panda_lightning.runtime.work import done
from panda_lightning.types import Batch, PandaError

__all__ = ["AnomalyDataModule", "Images", "Split", "View"]

Split = Literal["train", "test"]
T = TypeVar("T")
Rule = Annotated[str, Form(Intensity.parse, "auto, bits:N (8 to 32) or window:LO,HI")]


class AnomalyDataModule(Checked, pl.LightningDataModule, ABC):
    """A labelled data set as an anomaly-detection problem: normal images to train on, all test images to score.

    A data set is a subclass with ``classes`` and ``read``, and ``present`` and ``obtain`` where files can be fetched.
    Validation and test use the same labelled test images, as is the field's habit; nothing is chosen by their labels.

    Arguments are attributes and may be changed between runs: what was listed and decoded under others is made anew.
    What is left open (None) of protocol and view is, in a run, what the detector was trained with.

    Args:
        root: Folder of the data set's files.
        normal_class: Name or number of the normal class; where classes are named by numbers, a number is a name.
        protocol: one_vs_rest (the default): that class is normal, all others are anomalous. leave_one_out: the reverse.
        image_size: Side of the square images, in pixels; 224 by default.
        crop: center (the default but for ImageFolder) resizes the shorter side to ``resize`` and cuts the middle;
            squash resizes straight to the square.
        resize: Shorter side before the centre crop; None is image_size / 0.875 (256 for 224).
        interpolation: bilinear or bicubic; None takes the network's own.
        intensity: What becomes of files with more than 8 bits a value: auto (the default) takes the range of the format
            (16 bits: 0 to 65535; floating point: 0 to 1; DICOM: its window), bits:N takes 0 to 2^N - 1, window:LO,HI
            makes LO black and HI white; see pictures/pixels.py.
        mask_values: Values of masks that are anomalous: of grey, or of a palette's numbers; None is all but 0.
        max_megapixels: The largest image to read, in million pixels; None is Pillow's limit, 179.
        batch_size: Images of a training step, over all processes together.
        eval_batch_size: Images of a step of extraction and scoring, on each process.
        train_limit: Keep only so many normal training images, evenly spaced; None keeps all.
        shots: Train on so many of those, drawn by ``seed``; those of fewer shots are among those of more.
        test_limit: The same for test images.
        leave_out: Training images that are not to be used: a text file with a path or row number a line, or a table
            with a column path, such as `panda suspects` writes.
        calibration_fraction: Share of the normal training images that is held back from training and from the bank;
            what they score turns scores into p-values (README, decisions). Which they are depends on seed and names.
        memory_gb: Decoded images are kept in memory if all fit in so many GiB on each process, else read at every
            access.
        num_workers: Worker processes for images that stay on disk; None is the number of processors, at most 8.
        on_error: raise names unreadable images and stops; skip leaves them out and counts them.
        seed: Seed of the training images' order.
        outliers: Images for outlier exposure: a folder, a ``.npy`` file (N, H, W, 3) uint8 such as
            300K_random_images.npy, or a data set of this project as ``CLASS:ROOT``.

    Attributes:
        COMPUTING: Arguments that say where images are and how to load them, not which and how they look.
        decoded: Images by split with what they were made from; data modules of one class may share it.
    """

    COMPUTING = ("root", "eval_batch_size", "memory_gb", "num_workers", "accept_license", "max_megapixels")
    classes: tuple[str, ...] = ()
    default_crop: Literal["center", "squash"] = "center"
    own_split = False  # whether the split follows a rule of ours, which the run then records as a manifest

    def __init__(
        self,
        root: str = "data",
        normal_class: str | Number | None = None,
        protocol: Literal["one_vs_rest", "leave_one_out"] | None = None,
        image_size: Annotated[int, Bounds(1, 16384)] | None = None,
        crop: Literal["center", "squash"] | None = None,
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
            PandaError: If ``resize`` is smaller than the square that is cut out.
        """
        size = self._chosen("image_size", 224)
        resize = self._chosen("resize", round(size / 0.875))
        if resize < size:
            raise PandaError(f"resize={resize} is smaller than image_size={size}: choose {size} or more.")
        own = getattr(self._detector, "interpolation", None) or "bilinear"
        crop, interpolation = self._chosen("crop", self.default_crop), self._chosen("interpolation", own)
        values = None if self.mask_values is None else tuple(self.mask_values)
        rule = self._chosen("intensity", "auto")
        return View(size, crop, resize, interpolation, self.before, rule, values, self.max_megapixels)

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
        test = self.test_images
        normal = None
        try:
            normal = self.normal_images
        except PandaError:
            if training:
                raise
        return {
            "data": type(self).__name__,
            "problem": self.problem,
            "view": self.view.words,
            "normal training images": normal and f"{len(normal)} ({normal.fingerprint(self.root)})",
            "test images": f"{len(test)} ({test.fingerprint(self.root)})",
            "files": normal and normal.fingerprint(self.root, times=True),  # of this machine
            "on_error": self.on_error,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "calibration images": self.calibration_fraction,
            "outliers": self.outliers and training and self._outlier_source().fingerprint(Path(self.outliers)),
        }

    # ---- the protocol --------------------------------------------------------------------------------------------

    def class_number(self) -> int:
        """Number of ``normal_class``.

        Raises:
            PandaError: If there is no such class.
        """
        wanted = self._chosen("normal_class", None)
        wanted = self.only_class() if wanted is None else wanted
        if str(wanted) in self.classes:
            return self.classes.index(str(wanted))
        if str(wanted).isdecimal():
            numbers = [int(name) if name.isdecimal() else None for name in self.classes]
            if not any(number is not None for number in numbers):
                numbers = list(range(len(self.classes)))
            if numbers.count(int(str(wanted))) == 1:
                return numbers.index(int(str(wanted)))
        listed = ", ".join(self.classes[:25]) + (", ..." if len(self.classes) > 25 else "")
        raise PandaError(
            f"normal_class={self.normal_class} is not a class of {type(self).__name__} "
            f"(0-{len(self.classes) - 1}: {listed})."
        )

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
    def calibration_images(self) -> Images:
        """The normal training images that are held back, see ``calibration_fraction``."""
        return self._parted()[1]

    def _parted(self) -> tuple[Images, Images]:
        images, share = self.protocol_images("train"), self.calibration_fraction
        if not share:
            return images, images.take(np.array([], dtype=np.int64))
        settings = (share, self.seed, images.fingerprint(self.root))

        def part() -> tuple[Images, Images]:
            count = round(share * len(images))
            if not 2 <= count <= len(images) - 2:
                raise PandaError(
                    f"calibration_fraction={share:g} holds {count} of {len(images)} normal training images back: "
                    "choose a share that leaves 2 or more on either side."
                )
            held = np.sort(self._drawn("calibration", images)[:count])
            return images.take(np.setdiff1d(np.arange(len(images)), held)), images.take(held)

        return self._once(self._listed, "parted", settings, part)

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
            if not len(images):
                raise PandaError(
                    f"{type(self).__name__} has no training images of the normal class {self._normal_name} in "
                    f"{self.root}."
                )
            if self.leave_out is not None:
                images = self._without(images, self.leave_out)
        elif images.masks is not None:
            images = self._with_masks(images, anomalous)
        for problem in images.problems:
            rank_zero_warn(f"{type(self).__name__}: {problem}")
        for note in images.notes:
            rank_zero_info(f"{type(self).__name__}: {note}")
        limit = self.train_limit if split == "train" else self.test_limit
        if limit is not None and limit < len(images):
            images = images.take(np.linspace(0, len(images) - 1, limit).round().astype(np.int64))
        if split == "train" and self.shots is not None:
            if self.shots > len(images):
                raise PandaError(
                    f"shots={self.shots}, but there are {len(images)} normal training images: choose no more than that."
                )
            images = images.take(np.sort(self._drawn("shots", images)[: self.shots]))
        return images

    def _drawn(self, what: str, images: Images) -> npt.NDArray[np.int64]:
        """All rows in an order of chance that depends on seed and names alone."""
        hashes = [hashlib.sha256(f"{self.seed}/{what}/{name}".encode()).digest() for name in self.names(images)]
        return np.array(sorted(range(len(images)), key=hashes.__getitem__), dtype=np.int64)

    def _without(self, images: Images, listing: str) -> Images:
        """Images without those that a file lists.

        Raises:
            PandaError: If it cannot be read, or lists what is not there.
        """
        wanted = {os.path.abspath(path): path for path in listed_paths(listing)}
        places = [
            {os.path.abspath(path), os.path.abspath(name)}
            for path, name in zip(images.paths(), self.names(images), strict=True)
        ]
        left = [i for i, place in enumerate(places) if place.isdisjoint(wanted)]
        strange = sorted(path for place, path in wanted.items() if place not in set().union(*places))
        if strange:
            raise PandaError(
                f"leave_out={listing} lists {len(strange)} of {len(wanted)} that are no normal training images, such "
                f"as {strange[0]}: name files as they are, or below {self.root}."
            )
        if len(left) < 2:
            raise PandaError(
                f"leave_out={listing} leaves {len(left)} of {len(images)} normal training images: shorten it."
            )
        rank_zero_info(f"{len(images) - len(left)} of {len(images)} normal training images are left out by {listing}.")
        return images.take(np.array(left, dtype=np.int64))

    def _with_masks(self, images: Images, anomalous: npt.NDArray[np.bool_]) -> Images:
        """Images with the masks of those that are anomalous; one that is missing is a problem."""
        masks = [mask if a else None for mask, a in zip(images.masks or (), anomalous, strict=True)]
        lack = [i for i in np.flatnonzero(anomalous) if masks[i] is None]
        if not lack:
            return replace(images, masks=masks)
        names = self.names(images.take(np.array(lack[:5])))
        problem = (
            f"{len(lack)} of {anomalous.sum()} anomalous images have no mask, so their pixels do not count: "
            f"{', '.join(names)}{', ...' if len(lack) > 5 else ''}"
        )
        all_lack = len(lack) == anomalous.sum()
        return replace(images, masks=None if all_lack else masks, problems=(*images.problems, problem))

    @property
    def _normal_name(self) -> str:
        name = self.classes[self.class_number()]
        return name if self._chosen("protocol", "one_vs_rest") == "one_vs_rest" else f"all but {name}"

    @override
    def setup(self, stage: str) -> None:
        self._listed, self._shown, self._introduced = {}, {}, False  # files may have changed since the last run
        test = self.is_anomalous(self.test_images.targets)
        _ = self.view  # which says what cannot be
        if stage in ("fit", "validate", "test") and len(test) and test.all():
            raise PandaError(
                f"the test images of {type(self).__name__} are all anomalous with normal class {self._normal_name}: "
                "AUROC needs both kinds."
            )
        if stage == "predict" and not len(test):
            raise PandaError(f"{type(self).__name__} has no test images in {self.root} to predict.")
        if stage == "fit" and len(self.normal_images) < 2:
            raise PandaError(
                f"{type(self).__name__} has a single training image of the normal class {self._normal_name}: "
                "give 2 or more."
            )
        if stage == "fit" and self.batch_size % self._world:
            raise PandaError(
                f"batch_size={self.batch_size} is shared by {self._world} processes: "
                f"choose a multiple of {self._world}."
            )

    def manifest(self, splits: Sequence[Split] = ("train", "test")) -> str:
        """The images of the protocol as CSV, see datamodules/manifest.py."""
        return manifest(self, splits)

    def names(self, images: Images) -> list[str]:
        """What images are called: their files relative to ``root``, or their row numbers in the split."""
        return images.names(self.root)

    @override
    def teardown(self, stage: str) -> None:
        ours = self.own_split or self.calibration_fraction > 0
        folder = self.trainer.log_dir if self.trainer and ours else None  # asks all processes
        if self.trainer and folder and self.trainer.is_global_zero:
            splits: tuple[Split, Split] = ("test", "train")
            with new_file(Path(folder) / "manifest.csv") as part:
                part.write_text(self.manifest([s for s in splits if s in self._listed]))
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

    def _read_pixels(self, what: str, images: Images) -> Decoded:
        view = self.view
        size = len(images) * (3 if images.masks is None else 4) * view.size**2
        in_memory = size <= self.memory_gb * 2**30

        def read() -> Decoded:
            rank_zero_info(
                f"{type(self).__name__}: {len(images)} {what} images, {view.size} px, "
                + (f"decoded to {size / 2**20:.0f} MiB of memory" if in_memory else "read from disk at every access")
            )
            with done("decoded", what, len(images)):
                return decoded(images, view, in_memory, self.on_error == "skip", f"Decoding {what} images")

        made_from = (images.fingerprint(self.root, times=True), view, in_memory, self.on_error)
        return self._once(self.decoded, what, made_from, read)

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
        return self._dataset("normal training", images, np.zeros(len(images), dtype=np.bool_))

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

    def calibration_dataloader(self) -> DataLoader[Batch]:
        """The normal images that are held back, in order, each once over all processes."""
        images = self.calibration_images
        return self._loader(self._dataset("calibration", images, np.zeros(len(images), dtype=np.bool_)))

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
        settings = (self.outliers, self._outliers_needed, self.test_images.fingerprint(self.root), self.view.intensity)
        images = self._once(self._listed, "outlier", settings, self._outlier_images)
        return self._loader(self._dataset("outlier", images, np.ones(len(images), dtype=np.bool_)), train=True)

    def _outlier_images(self) -> Images:
        images, needed = self._outlier_source(), self._outliers_needed
        if needed is not None and needed < len(images):  # the rest would pass filter and frozen layers for nothing
            rank_zero_info(f"{needed} of {len(images)} outliers are as many as this run's steps take.")
            images = images.take(np.linspace(0, len(images) - 1, needed).round().astype(np.int64))
        return outliers_apart(images, self.test_images, self.view.intensity)

    @property
    def _outliers_needed(self) -> int | None:
        """As many outliers as the steps of this run can take; None where there is no such number."""
        trainer, batches = self.trainer, -(-len(self.normal_images) // self.batch_size)
        epochs = None if trainer is None or (trainer.max_epochs or -1) < 0 else trainer.max_epochs
        steps = [] if epochs is None else [epochs * batches]
        if trainer is not None and trainer.max_steps >= 0:
            steps.append(trainer.max_steps * trainer.accumulate_grad_batches)
        return min(steps) * self.batch_size if steps else None

    def _outlier_source(self) -> Images:
        source = self.outliers
        if source is None:
            raise PandaError(
                "outlier exposure needs images that show nothing of the test classes: set data.outliers to a folder, a "
                ".npy file such as 300K_random_images.npy, or a data set as CLASS:ROOT."
            )
        known = {cls.__name__: cls for cls in subclasses(AnomalyDataModule)}
        return self._once(self._listed, "outlier source", source, lambda: read_outliers(source, known))
