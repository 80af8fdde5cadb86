"""What a distance between pooled features is made of: the nearest normal images, and positions of the feature map."""

from typing import Any

import torch
from torch import Tensor

from panda_lightning.networks.pyramid import positions, resized
from panda_lightning.runtime.float32 import full_float32
from panda_lightning.types import Batch, PandaError


def nearest_images(detector: Any, batch: Batch) -> dict[str, Tensor]:
    """The score of DN2 and what it is made of, see Detector.explained; maps where ``detector.maps``."""
    features = detector.embed(batch)
    listed = min(max(detector.k + 1, detector.LISTED), len(detector.index))
    # a k that the bank has not is refused by the search
    count = detector.k if detector.reduced else max(detector.k, listed)
    distances, rows = detector._neighbours(features, count)
    found = {"score": distances[:, : detector.k].sum(dim=1)}
    if not detector.reduced:  # a centroid is no image
        found |= {"neighbour": rows, "distance": distances}
    if detector.maps:
        found["map"] = shares(detector, batch, features, rows[:, : detector.k])
    return found


def shares(detector: Any, batch: Batch, features: Tensor, rows: Tensor) -> Tensor:
    r"""How the positions p of the last feature map g make up the score: (B, H, W), whose mean is the score.

    .. math:: \sum_i \lVert f - f_i \rVert^2 = \frac1P \sum_p \sum_i (f - f_i) \cdot (g_p - f_i),
              \quad f = \frac1P \sum_p g_p

    With ``normalize``, g and f are divided by the length of f.

    Args:
        detector: A DN2.
        batch: Images.
        features: f (B, D) of them.
        rows: Of the bank's nearest f_i (B, k).

    Raises:
        PandaError: If the bank is in parts.
    """
    if detector.shard_bank:
        raise PandaError("maps need the whole bank on each process: leave shard_bank out.")
    parts = positions(detector.backbone, batch["image"])  # (B, D, h, w)
    length = features.norm(dim=1) if detector.normalize else torch.ones_like(features[:, 0])
    near = detector.entries()[rows]  # (B, k, D)
    gaps = detector.scoring_space(features).unsqueeze(1) - near
    with full_float32(features.device):  # its mean is a small difference of large numbers
        found = torch.einsum("bd,bdhw->bhw", gaps.sum(dim=1), parts / length.view(-1, 1, 1, 1))
    found = found - (gaps * near).sum(dim=(1, 2)).view(-1, 1, 1)
    return resized(found, batch["image"].shape[2:])
