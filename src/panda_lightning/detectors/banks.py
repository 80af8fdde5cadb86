"""A bank that grows and shrinks without the images that it was made of."""

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from panda_lightning.detectors.base import Detector
from panda_lightning.detectors.precision import computed_as
from panda_lightning.detectors.scoring import ready
from panda_lightning.pictures.loose import Loose, LooseDataset, pointed_at
from panda_lightning.pictures.view import View
from panda_lightning.types import PandaError

SAME = 1e-5  # two pictures are one where they are so much nearer than others


def names(detector: Detector) -> list[str]:
    """What the bank's images are called; numbers where that is not known.

    Raises:
        PandaError: If there is no bank of images.
    """
    detector.require_learned()
    ready(detector)
    if not isinstance(detector.bank, torch.Tensor):
        raise PandaError(f"{detector.method} has no bank of images: train it again with the images that you want.")
    return detector.bank_names or [str(row) for row in range(len(detector.bank))]


@torch.no_grad()
def add(detector: Detector, images: Any, batch_size: int = 32) -> list[str]:
    """Add normal images to the bank, behind those that are there; nothing is trained.

    The rows are those of a bank that was built from all images, to the rounding of the network's precision. Scores of
    images that were held back for p-values follow, if the detector keeps their features (DN2, PANDA, MSC); else they
    are forgotten. PatchCore keeps all patches of the new images, for the choice of its coreset cannot be gone back to.

    Args:
        detector: From a checkpoint, or after a run.
        images: See pictures.loose.pointed_at.
        batch_size: Images of a step.

    Returns:
        The names of the new images.

    Raises:
        PandaError: If one cannot be read or is there already, or the method has no such bank; then nothing has changed.
    """
    before, found = names(detector), pointed_at(images)
    there = {os.path.realpath(name): name for name in before if os.path.isabs(name)}  # others were below some folder
    for name in found.names:
        if os.path.realpath(name) in there or name in before:
            raise PandaError(
                f"{name} is already in the bank or was given twice: give only new images, each once. If it is another "
                "image of the same name, give its absolute path."
            )
        there[os.path.realpath(name)] = name
    training = detector.training
    detector.eval()
    try:
        rows = _rows(detector, found, batch_size)
    finally:
        detector.train(training)
    detector.bank_names = before
    detector.join_bank(rows)
    _changed(detector, [*before, *found.names], found.names, [])
    return found.names


def _rows(detector: Detector, found: Loose, batch_size: int) -> torch.Tensor:
    """What ``embed`` makes of new images; those that are not new are refused."""
    view = View.of((detector.origin or {})["view"])
    dataset = LooseDataset(found, view, threads=True)
    batch_size = batch_size if view.sides is not None else 1
    embed: Any = detector.embed
    parts: list[torch.Tensor] = []
    seen: dict[bytes, str] = {}
    for start in track(range(0, len(found), batch_size), "New images", transient=True):
        batch: Any = dataset.__getitems__(range(start, min(start + batch_size, len(found))))
        shown = found.names[start : start + batch_size]
        for name, reason, picture in zip(shown, batch["unreadable"], batch["image"], strict=True):
            if reason:
                raise PandaError(f"{name} cannot be read ({reason}): leave it out.")
            other = seen.setdefault(picture.numpy().tobytes(), name)
            if other != name:
                raise PandaError(f"{name} shows the same as {other}: leave one of them out.")
        batch["image"] = batch["image"].to(detector.device)
        with computed_as(detector):
            parts.append(embed(batch))
            near = detector.explained(batch)
        for i, name in enumerate(shown):
            if detector.held_back(parts[-1][i : i + 1]).any():
                raise PandaError(f"{name} was held back for p-values, so it cannot be in the bank too: leave it out.")
            if "distance" in near and near["distance"][i, 0] <= SAME * near["distance"][i, -1]:
                other = detector.bank_names[int(near["neighbour"][i, 0])] if detector.bank_names else "an image"
                raise PandaError(f"{name} shows the same as {other} of the bank: leave it out.")
    if len({part.shape[1:] for part in parts}) > 1:
        raise PandaError(
            f"the new images have different sizes, but {detector.method} adds images of only one size at a time: "
            "add each size separately."
        )
    return torch.cat(parts)


def remove(detector: Detector, like: Sequence[str]) -> list[str]:
    """Take normal images out of the bank.

    Args:
        detector: From a checkpoint, or after a run.
        like: Names or patterns (``*/2026-11-*.jpg``), of whole paths or of the files' own names.

    Returns:
        The names of those that went.

    Raises:
        PandaError: If a pattern matches none, or what is left does not do; then nothing has changed.
    """
    before = names(detector)

    gone_rows: set[int] = set()
    for pattern in like:
        rows = [i for i, name in enumerate(before) if name == pattern]  # a name may look like a pattern of others
        rows = rows or [
            i for i, name in enumerate(before) if any(fnmatchcase(one, pattern) for one in (name, Path(name).name))
        ]
        if not rows:
            raise PandaError(f"{pattern} matches none of the {len(before)} normal images, such as {before[0]}.")
        gone_rows.update(rows)
    kept = torch.tensor([i not in gone_rows for i in range(len(before))])
    gone = [name for name, stays in zip(before, kept, strict=True) if not stays]
    detector.bank_names = before
    detector.leave_bank(kept)
    _changed(detector, [name for name, stays in zip(before, kept, strict=True) if stays], [], gone)
    return gone


def _changed(detector: Detector, now: list[str], added: list[str], gone: list[str]) -> None:
    came, went = detector.bank_changes
    detector.bank_changes = (
        [name for name in [*came, *added] if name not in gone],
        [*went, *(name for name in gone if name not in came)],
    )
    detector.bank_names = now
    detector.fit_index()
    detector.recalibrate()
