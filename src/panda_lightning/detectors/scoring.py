"""Scores of pictures without a Trainer, and what a row of results is made of."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from rich.progress import track

from panda_lightning.arguments import Count, OpenShare, Positive, require
from panda_lightning.pictures.images import View
from panda_lightning.pictures.loose import LooseDataset, pointed_at
from panda_lightning.runtime.results import Results, joined, level_of, results


@torch.inference_mode()
def score(
    detector: Any,
    images: Any,
    alpha: OpenShare | None = None,
    maps: bool = False,
    batch_size: Count = 32,
    max_megapixels: Positive | None = None,
) -> Results:
    """Score pictures with a detector that was trained, tested or loaded from a checkpoint.

    The numbers are those of ``lightning test`` and ``predict``, to the rounding of the network's precision. Pictures
    are resized as the detector's were, and scored on its device (``detector.to("cuda")``). Memory grows with the maps
    alone.

    Args:
        detector: A Detector.
        images: See pictures.loose.pointed_at.
        alpha: An image is anomalous where its p-value is no larger; None is .05, where the calibration allows it.
        maps: Draw for DN2, PANDA and MSC how each distance is made up; methods with maps of their own always do.
        batch_size: Images of a step.
        max_megapixels: See AnomalyDataModule.

    Raises:
        PandaError: If the detector is not ready, or there are no images.
    """
    for name, value, hint in (
        ("alpha", alpha, OpenShare | None),
        ("batch_size", batch_size, Count),
        ("max_megapixels", max_megapixels, Positive | None),
    ):
        require(name, value, hint)
    detector.require_learned()
    dataset = LooseDataset(pointed_at(images), View.of(detector.origin["view"], max_megapixels), threads=True)
    with _evaluating(detector, maps):
        calibration = detector.ready()
        level = level_of(calibration, alpha)
        parts = []
        starts = range(0, len(dataset), batch_size)
        for start in track(starts, "Scoring", transient=True, disable=len(starts) < 4):
            batch = dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))
            names, reasons = dataset.images.names[start : start + batch_size], batch.pop("unreadable")
            moved: Any = {key: value.to(detector.device) for key, value in batch.items()}  # type: ignore[attr-defined]
            found = detector.explained(moved)
            parts.append(results(names, reasons, found, detector.bank_names, calibration, level))
    return joined(parts)


@contextmanager
def _evaluating(detector: Any, maps: bool) -> Iterator[None]:
    """The detector in eval mode, in the precision of its run, with maps or without."""
    before = detector.training, detector.maps
    detector.eval()
    detector.maps = maps
    try:
        with computed_as(detector):
            yield
    finally:
        detector.train(before[0])
        detector.maps = before[1]


def computed_as(detector: Any) -> AbstractContextManager[Any]:
    """Autocast where the detector's precision is mixed; weights of half precision are computed in float32."""
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(detector.precision)
    return nullcontext() if kind is None else torch.autocast(detector.device.type, kind)
