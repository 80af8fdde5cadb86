"""Loss terms as pure functions, each with its formula."""

from collections.abc import Sequence
from typing import Any

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
    value: Tensor = _EWC.apply(list(start), list(fisher), *params)
    return value


class _EWC(torch.autograd.Function):
    """The term and its gradient F (theta - theta0) from one pass over the weights, few kernels for all layers."""

    @staticmethod
    def forward(ctx: Any, start: list[Tensor], fisher: list[Tensor], *params: Tensor) -> Tensor:
        moved = torch._foreach_sub(list(params), start)
        pull = torch._foreach_mul(moved, fisher)
        ctx.save_for_backward(*pull)
        return 0.5 * torch.stack([torch.dot(m.flatten(), p.flatten()) for m, p in zip(moved, pull, strict=True)]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(list(ctx.saved_tensors), grads[0])
