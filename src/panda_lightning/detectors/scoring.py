"""Scores of pictures without a Trainer, and what a row of results is made of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.progress import track

from panda_lightning.arguments import Count, OpenShare, Positive, require
from panda_lightning.callbacks.predictions import own_size
from panda_lightning.detectors.origins import arguments
from panda_lightning.detectors.precision import computed_as
from panda_lightning.pictures.loose import LooseDataset, pointed_at
from panda_lightning.pictures.shapes import batches
from panda_lightning.pictures.view import MapSize, View
from panda_lightning.runtime.results import Calibration, Results, joined, level_of, results
from panda_lightning.types import PandaError


@torch.inference_mode()
def score(
    detector: Any,
    images: Any,
    alpha: OpenShare | None = None,
    maps: bool = False,
    batch_size: Count = 32,
    max_megapixels: Positive | None = None,
    map_size: MapSize | None = None,
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
        map_size: Give maps in the pixels of what the network saw (view), or in those of each picture (original), NaN
            where the view shows nothing; None is as the detector's ``map_size``, if it has one.

    Raises:
        PandaError: If the detector is not ready, or there are no images.
    """
    for name, value, hint in (
        ("alpha", alpha, OpenShare | None),
        ("batch_size", batch_size, Count),
        ("max_megapixels", max_megapixels, Positive | None),
        ("map_size", map_size, MapSize | None),
    ):
        require(name, value, hint)
    detector.require_learned()
    dataset = LooseDataset(pointed_at(images), View.of(detector.origin["view"], max_megapixels), threads=True)
    with _evaluating(detector, maps):
        calibration = ready(detector)
        level = level_of(calibration, alpha)
        parts = []
        steps = batches(torch.arange(len(dataset)), dataset.kinds, batch_size)
        for rows in track(steps, "Scoring", transient=True, disable=len(steps) < 4):
            batch = dataset.__getitems__(rows.tolist())
            names, reasons = [dataset.images.names[row] for row in rows], batch.pop("unreadable")
            moved: Any = {key: value.to(detector.device) for key, value in batch.items()}  # type: ignore[attr-defined]
            found = detector.explained(moved)
            part = results(names, reasons, found, detector.bank_names, calibration, level)
            if own_size(map_size, detector) and part.maps is not None:
                sources = [dataset.images.sources[row] for row in rows]
                triples = zip(part.maps, sources, reasons, strict=True)
                own = [m if reason else dataset.view.own_map(m, source) for m, source, reason in triples]
                part = replace(part, maps=own)
            parts.append(part)
    return joined(parts, torch.cat(steps).tolist())


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


def ready(detector: Any) -> Calibration | None:
    """Make the detector's bank searchable without a run; once, unless weights, bank, arguments or device change.

    Returns:
        The calibration, None where there is none.

    Raises:
        PandaError: If there is no bank for these weights.
    """
    tensors = [(t.data_ptr(), t._version) for t in (*detector.parameters(), *detector.buffers())]
    state, before = [tensors, arguments(detector), str(detector.device)], detector._ready
    alike = before is not None and before[0] == state
    if before is None or not (alike and before[1] is detector.bank and before[2] is detector.held_out):
        if detector.has_bank:
            if not detector.bank_is_fresh:
                raise PandaError(
                    f"{detector.method} has no bank of normal images for its weights: test it with the data set, "
                    "or load a checkpoint from the end of an epoch."
                )
            detector.fit_index()  # the bank is on this device now
        before = detector._ready = (state, detector.bank, detector.held_out, detector.calibration)
    found: Calibration | None = before[3]
    return found
