"""Loss terms as pure functions, each with its formula."""

from collections.abc import Sequence

import torch
from torch import Tensor


def compactness(features: Tensor, centre: Tensor) -> Tensor:
    r"""Distance of each feature to the centre of the normal images, PANDA section 3.2.

    .. math:: \lVert f(x) - c \rVert^2 / D

    Args:
        features: (B, D), features of normal images.
        centre: (D,), constant.

    Returns:
        (B,), one value an image; the loss is their mean.
    """
    return (features - centre).square().mean(dim=1)


def ewc(params: Sequence[Tensor], start: Sequence[Tensor], fisher: Sequence[Tensor]) -> Tensor:
    r"""Elastic weight consolidation: what the pretraining task would lose, PANDA section 3.3.

    .. math:: \tfrac12 \sum_i F_i (\theta_i - \theta^0_i)^2

    Args:
        params: Adapted parameters, theta.
        start: Their pretrained values, same shapes.
        fisher: The Fisher-information diagonal, same shapes, not negative.

    Returns:
        A scalar.
    """
    terms = [(f * (p - s).square()).sum() for p, s, f in zip(params, start, fisher, strict=True)]
    return 0.5 * torch.stack(terms).sum()
