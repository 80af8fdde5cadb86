"""Images that no run can work with are refused before any is decoded; what others take is said."""

import math
from typing import Any

from pytorch_lightning.utilities import rank_zero_info

from panda_lightning.pictures.images import Images
from panda_lightning.runtime.sizes import in_words
from panda_lightning.types import PandaError


def require_training_images(data: Any, images: Images) -> None:
    """Refuse a normal class without training images.

    Args:
        data: An AnomalyDataModule.
        images: Its training images of the normal class.

    Raises:
        PandaError: If there are none.
    """
    if not len(images):
        raise PandaError(
            f"{type(data).__name__} has no training images of the normal class {_normal(data)} in {data.root}."
        )


def require_images(data: Any, stage: str, world: int) -> None:
    """Refuse images that do not suit the stage of a run.

    Args:
        data: An AnomalyDataModule.
        stage: fit, validate, test or predict.
        world: Number of processes.

    Raises:
        PandaError: Saying what is missing, or which argument cannot be.
    """
    test = data.is_anomalous(data.test_images.targets)
    _ = data.view  # which says what cannot be
    if stage in ("fit", "validate", "test") and len(test) and test.all():
        raise PandaError(
            f"the test images of {type(data).__name__} are all anomalous with normal class {_normal(data)}: "
            "AUROC needs both kinds."
        )
    if stage == "predict" and not len(test):
        raise PandaError(f"{type(data).__name__} has no test images in {data.root} to predict.")
    if stage == "fit" and len(data.normal_images) < 2:
        raise PandaError(
            f"{type(data).__name__} has a single training image of the normal class {_normal(data)}: give 2 or more."
        )
    if stage == "fit" and data.batch_size % world:
        raise PandaError(f"batch_size={data.batch_size} is shared by {world} processes: choose a multiple of {world}.")


def say_where(data: Any, what: str, images: Images, size: int, in_memory: bool) -> None:
    """Say whether images will be kept in memory, and how many bytes they take there."""
    where = f"decoded to {in_words(size)} of memory"
    if not in_memory:
        where = (
            f"read from disk at every access: decoded they take {in_words(size)}, more than memory_gb="
            f"{data.memory_gb:g} allows. If each process has that much memory, set data.memory_gb="
            f"{math.ceil(size / 2**30)}."
        )
    rank_zero_info(f"{type(data).__name__}: {len(images)} {what} images, {data.view.pixels}, {where}")


def _normal(data: Any) -> str:
    """What is normal, in words."""
    name, protocol = data.problem["normal_class"], data.problem["protocol"]
    return str(name) if protocol == "one_vs_rest" else f"all but {name}"
