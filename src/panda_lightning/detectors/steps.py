"""What training steps of several methods need: images of all processes, random numbers, fresh layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panda_lightning.detectors.base import Detector
from panda_lightning.runtime.float32 import full_float32
from panda_lightning.types import Batch


def real_images(detector: Detector, batch: Batch) -> Batch:
    """The batch without fillers (index -1), for networks whose images are not independent; it may be empty.

    The last of an epoch alone may have some; no other waits until a GPU can tell.
    """
    if not detector.trainer.is_last_batch:
        return batch
    real = batch["index"] >= 0
    kept: Any = {key: value[real] for key, value in batch.items()}  # type: ignore[index]
    return cast(Batch, kept)


def of_all(detector: Detector, rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, ...) of all processes, as many on each, fillers (index -1) left out; gradients flow back to each."""
    if detector.trainer.world_size == 1:
        return rows
    everyone, places = (cast(Tensor, detector.all_gather(t, sync_grads=True)).flatten(0, 1) for t in (rows, index))
    return everyone[places >= 0]


def draws(detector: Detector, batch: Batch, columns: int) -> Tensor:
    """Uniform random numbers in [0, 1) for augmentation, (B, columns).

    They depend on seed, epoch and image alone: the same for any number of processes, and after a resume. Those of all
    images stay on the device for the epoch, so that no step waits for them.
    """
    place = (detector.data.seed, detector.current_epoch, columns)
    made_for = (*place, len(detector.data.normal_images), detector.device)
    if detector._drawn is None or detector._drawn[0] != made_for:
        generator = torch.Generator().manual_seed(hash(place) % 2**63)
        numbers = torch.rand(len(detector.data.normal_images), columns, generator=generator)
        detector._drawn = (made_for, numbers.to(detector.device))
    return detector._drawn[1][batch["index"].clamp(min=0)]


def linear(layer: nn.Linear, features: Tensor) -> Tensor:
    """A last layer in at least float32, whatever the run's precision: logits in half precision tie, and lose ranks."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    with full_float32(features.device):
        return F.linear(features.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


@contextmanager
def seeded() -> Iterator[None]:
    """Draw new layers from the run's seed alone: the same ones however many processes have drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield
