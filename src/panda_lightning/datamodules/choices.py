"""Which images of a split a run uses, as its arguments say: the normal class, limits, shots, lists and masks."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from panda_lightning.pictures.images import Images
from panda_lightning.pictures.loose import listed_paths
from panda_lightning.types import Batch, PandaError


def class_number(wanted: str | int | None, data: Any) -> int:
    """Number of a class that is given by name or number; where names are numbers, a number is a name.

    Raises:
        PandaError: If a data module has no such class.
    """
    classes = data.classes
    if str(wanted) in classes:
        return int(classes.index(str(wanted)))
    if str(wanted).isdecimal():
        numbers = [int(name) if name.isdecimal() else None for name in classes]
        if not any(number is not None for number in numbers):
            numbers = list(range(len(classes)))
        if numbers.count(int(str(wanted))) == 1:
            return numbers.index(int(str(wanted)))
    listed = ", ".join(classes[:25]) + (", ..." if len(classes) > 25 else "")
    trained = ", with which the detector was trained," if data.normal_class is None and wanted is not None else ""
    raise PandaError(
        f"normal_class={wanted}{trained} is not a class of {type(data).__name__} (0-{len(classes) - 1}: {listed})."
    )


def limited(data: Any, split: str, images: Images, anomalous: npt.NDArray[np.bool_]) -> Images:
    """What the arguments of a data module leave of a split, and say what is worth knowing of it.

    Args:
        data: An AnomalyDataModule.
        split: train or test.
        images: Those of the protocol.
        anomalous: Which are, in the whole split.

    Raises:
        PandaError: If an argument asks for what is not there.
    """
    train = split == "train"
    if train and data.leave_out is not None:
        images = without(images, data.leave_out, data.root)
    elif not train and images.masks is not None:
        images = with_masks(images, anomalous, data.root)
    for problem in images.problems:
        rank_zero_warn(f"{type(data).__name__}: {problem}")
    for note in images.notes:
        rank_zero_info(f"{type(data).__name__}: {note}")
    images = evenly(images, data.train_limit if train else data.test_limit)
    return drawn(images, data.shots, data.seed, data.root) if train and data.shots is not None else images


def evenly(images: Images, limit: int | None) -> Images:
    """So many images, evenly spaced; all where there are no more, or None is given."""
    if limit is None or limit >= len(images):
        return images
    return images.take(np.linspace(0, len(images) - 1, limit).round().astype(np.int64))


def drawn(images: Images, shots: int, seed: int, root: Path) -> Images:
    """So many images by chance, in their order; those of fewer shots are among those of more.

    Raises:
        PandaError: If there are not as many.
    """
    if shots > len(images):
        raise PandaError(
            f"shots={shots}, but there are {len(images)} normal training images: choose no more than that."
        )
    return images.take(np.sort(_by_chance(images, "shots", seed, root)[:shots]))


def parted(images: Images, share: float, seed: int, root: Path) -> tuple[Images, Images]:
    """Normal training images without those that are held back by chance, and these.

    Raises:
        PandaError: If fewer than 2 are left on either side.
    """
    count = round(share * len(images))
    if not 2 <= count <= len(images) - 2:
        raise PandaError(
            f"calibration_fraction={share:g} holds back {count} of {len(images)} normal training images: choose "
            "a share that gives 2 or more images to both calibration and training."
        )
    held = np.sort(_by_chance(images, "calibration", seed, root)[:count])
    return images.take(np.setdiff1d(np.arange(len(images)), held)), images.take(held)


def _by_chance(images: Images, what: str, seed: int, root: Path) -> npt.NDArray[np.int64]:
    """All rows in an order of chance that depends on seed and names alone."""
    hashes = (hashlib.sha256(f"{seed}/{what}/{name}".encode()).digest() for name in images.names(root))
    return np.argsort(np.fromiter(hashes, "S32", len(images)), kind="stable")


def without(images: Images, listing: str, root: Path) -> Images:
    """Normal training images without those that a file lists, see ``leave_out``.

    Raises:
        PandaError: If it cannot be read, or lists what is not there.
    """
    wanted = {os.path.abspath(path): path for path in listed_paths(listing)}
    places = [
        {os.path.abspath(path), os.path.abspath(name)}
        for path, name in zip(images.paths(), images.names(root), strict=True)
    ]
    here = set().union(*places)
    left = [i for i, place in enumerate(places) if place.isdisjoint(wanted)]
    strange = sorted(path for place, path in wanted.items() if place not in here)
    if strange:
        raise PandaError(
            f"leave_out={listing} lists {len(wanted)} entries, but {len(strange)} of them are not normal "
            f"training images, such as {strange[0]}: give paths as they are, or relative to {root}."
        )
    if len(left) < 2:
        raise PandaError(
            f"leave_out={listing} leaves only {len(left)} of {len(images)} normal training images: shorten it."
        )
    rank_zero_info(f"{len(images) - len(left)} of {len(images)} normal training images are left out by {listing}.")
    return images.take(np.array(left, dtype=np.int64))


def with_masks(images: Images, anomalous: npt.NDArray[np.bool_], root: Path) -> Images:
    """Images with the masks of those that are anomalous (N,); one that is missing is a problem."""
    masks = [mask if a else None for mask, a in zip(images.masks or (), anomalous, strict=True)]
    lack = [i for i in np.flatnonzero(anomalous) if masks[i] is None]
    if not lack:
        return replace(images, masks=masks)
    names = images.take(np.array(lack[:5])).names(root)
    problem = (
        f"{len(lack)} of {anomalous.sum()} anomalous images have no mask, so their pixels do not count: "
        f"{', '.join(names)}{', ...' if len(lack) > 5 else ''}"
    )
    all_lack = len(lack) == anomalous.sum()
    return replace(images, masks=None if all_lack else masks, problems=(*images.problems, problem))


class HoldsBack:
    """The part of a data module that ``calibration_fraction`` asks for."""

    def _parted(self: Any) -> tuple[Images, Images]:
        """The normal training images of the protocol without those that are held back, and these."""
        images, share = self.protocol_images("train"), self.calibration_fraction
        if not share:
            return images, images.take(np.array([], dtype=np.int64))
        settings = (share, self.seed, images.fingerprint(self.root))
        made = self._once(self._listed, "parted", settings, lambda: parted(images, share, self.seed, self.root))
        both: tuple[Images, Images] = made
        return both

    @property
    def calibration_images(self) -> Images:
        """The normal training images that are held back."""
        return self._parted()[1]

    def calibration_dataloader(self: Any) -> DataLoader[Batch]:
        """The normal images that are held back, in order, each once over all processes."""
        images = self.calibration_images
        normal = np.zeros(len(images), dtype=np.bool_)
        loader: DataLoader[Batch] = self._loader(self._dataset("calibration", images, normal))
        return loader
