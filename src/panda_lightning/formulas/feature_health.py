"""What tells without labels how features fare: how many directions they use, and whether neighbours stay neighbours."""

import torch
from torch import Tensor

from panda_lightning.runtime.systems import widenable


def effective_rank(features: Tensor) -> float:
    r"""How many directions features (N, D) spread in: between 1 and min(N - 1, D).

    .. math:: \exp\Bigl(-\sum_i p_i \log p_i\Bigr), \quad p_i = \frac{\sigma_i}{\sum_j \sigma_j}

    The sigmas are the singular values of the features less their mean (Roy, Vetterli 2007). Features that are all
    alike have 1.
    """
    features = widenable(features)
    centred = features.double() - features.double().mean(dim=0)
    gram = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not float(sigma.sum()):
        return 1.0
    share = sigma / sigma.sum()
    return float(torch.exp(torch.special.entr(share).sum()))


def variance(features: Tensor) -> float:
    """Mean squared distance of features (N, D) to their mean."""
    features = widenable(features)
    return float((features.double() - features.double().mean(dim=0)).square().sum(dim=1).mean())


def kept(before: Tensor, now: Tensor) -> float:
    """The share of rows in ``before`` (N, k), each row of numbers without repeats, that ``now`` (N, k) holds too."""
    return float((before.unsqueeze(2) == now.unsqueeze(1)).any(dim=2).double().mean())
