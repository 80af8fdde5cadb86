"""Metrics of raw anomaly scores: exact AUROC.

torchmetrics' binary metrics pass values outside [0, 1] through a sigmoid, which saturates on squared distances
and reads 0.5; everything here works on ranks instead.
"""

import math

import torch
from torch import Tensor

from panda_lightning.runtime.systems import widenable
from panda_lightning.types import PandaError


def auroc(scores: Tensor, labels: Tensor) -> float:
    r"""Area under the ROC curve as the Mann-Whitney statistic, ties counted half, in float64.

    .. math:: P(s_{anomalous} > s_{normal}) + \tfrac12 P(s_{anomalous} = s_{normal})

    Args:
        scores: (N,), higher is more anomalous, on any scale.
        labels: (N,), 1 = anomalous, 0 = normal.

    Returns:
        A fraction in [0, 1]; NaN if there are no normal or no anomalous images.

    Raises:
        PandaError: If a score is NaN or infinite.

    Examples:
        >>> auroc(torch.tensor([0.1, 0.4, 0.35, 80.0]), torch.tensor([0, 0, 1, 1]))
        0.75
    """
    scores, labels = widenable(scores.detach()).flatten(), widenable(labels.detach()).flatten().bool()
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise PandaError(
            f"{bad} of {len(scores)} anomaly scores are NaN or infinite, so there is no AUROC: lower the learning "
            "rate, or use float32 if this run used half precision."
        )
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return math.nan
    _, group, size = torch.unique(scores, return_inverse=True, return_counts=True)  # sorted
    size = size.double()
    mean_rank = size.cumsum(0) - (size - 1) / 2  # of each group of equal scores, counted from 1
    rank_sum = float(mean_rank[group[labels]].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
