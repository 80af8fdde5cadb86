"""Loss terms as pure functions, each with its formula."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from panda_lightning.runtime.float32 import full_float32


def compactness(features: Tensor, centre: Tensor) -> Tensor:
    r"""Distance of each feature to the centre of the normal images, PANDA section 3.2.

    .. math:: \lVert f(x) - c \rVert^2 / D

    Args:
        features: (B, D), features of normal images.
        centre: (D,), constant.

    Returns:
        (B,), one value an image; the loss is their mean.

    Examples:
        >>> compactness(torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([1.0, 0.0]))
        tensor([2.0000, 4.5000])
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

    Examples:
        >>> ewc([torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 2.5])], [torch.tensor([2.0, 4.0])])
        tensor(1.5000)
    """
    value: Tensor = _EWC.apply(list(start), list(fisher), *params)
    return value


class _EWC(torch.autograd.Function):
    """The term and its gradient F (theta - theta0) from one pass over the weights, few kernels for all layers."""

    @staticmethod
    def forward(ctx: Any, start: list[Tensor], fisher: list[Tensor], *params: Tensor) -> Tensor:
        # weights in half precision are too coarse to be subtracted in it
        wide = [torch.promote_types(p.dtype, f.dtype) for p, f in zip(params, fisher, strict=True)]
        moved = torch._foreach_sub(*([t.to(d) for t, d in zip(ts, wide, strict=True)] for ts in (params, start)))
        pull = torch._foreach_mul(moved, fisher)
        ctx.save_for_backward(*pull)
        ctx.dtypes = [p.dtype for p in params]
        return 0.5 * torch.stack([torch.dot(m.flatten(), p.flatten()) for m, p in zip(moved, pull, strict=True)]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pulls = torch._foreach_mul(list(ctx.saved_tensors), grads[0])
        return None, None, *(pull.to(dtype) for pull, dtype in zip(pulls, ctx.dtypes, strict=True))


def mean_shifted(first: Tensor, second: Tensor, centre: Tensor, temperature: float = 0.25) -> Tensor:
    r"""Mean-shifted contrastive loss (arXiv 2106.03844, section 4.1): NT-Xent around the centre of the normal images.

    .. math:: -\frac{1}{2B} \sum_{i=1}^{2B} \log \frac{\exp(\theta_i \cdot \theta_{i'} / \tau)}
              {\sum_{m \neq i} \exp(\theta_i \cdot \theta_m / \tau)},
              \quad \theta = \frac{f - c}{\lVert f - c \rVert}

    i' is the other view of i's image; the sum below runs over both views of all images but i itself.

    Args:
        first: (B, D), L2-normalised features of one view of each image.
        second: (B, D), those of another view.
        centre: (D,), constant.
        temperature: Tau.

    Returns:
        A scalar.
    """
    shifted = F.normalize(torch.cat([first, second]) - centre, dim=1)
    with full_float32(shifted.device):  # in half precision the views of an image and others tie
        similar = (shifted @ shifted.T / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(len(similar), device=similar.device).roll(len(first))
    return F.cross_entropy(similar, other)


def soft_boundary(distances: Tensor, radius: Tensor, nu: float) -> Tensor:
    r"""Deep SVDD with a soft boundary (Ruff et al. 2018, equation 3), without weight decay.

    .. math:: R^2 + \frac{1}{\nu} \max(0, d - R^2)

    Args:
        distances: (B,), squared distances d to the centre.
        radius: Scalar R.
        nu: Share of images that may lie outside.

    Returns:
        (B,), one value an image; the loss is their mean.
    """
    return radius.square() + (distances - radius.square()).clamp(min=0) / nu
