"""A few points that stand for many: greedy k-centre selection."""

from collections.abc import Iterator

import torch
from torch import Tensor

from panda_lightning.knn import full_float32

PROJECTED = 128  # dimensions in which distances are taken


@torch.no_grad()
def greedy_coreset(points: Tensor, size: int, seed: int = 0) -> Iterator[Tensor]:
    r"""Choose points one after the other, each the farthest from all chosen so far.

    .. math:: i_{n+1} = \arg\max_i \min_{j \le n} \lVert x_i - x_{i_j} \rVert^2

    The first is drawn by the seed. Points of more than ``PROJECTED`` dimensions are projected to so many by a Gaussian
    matrix of the same seed, which keeps distances to within some percent (Johnson and Lindenstrauss). This is
    Algorithm 1 of PatchCore (Roth et al., CVPR 2022).

    Args:
        points: (N, D), on any device.
        size: How many to choose, 1 to N.
        seed: Of first point and projection.

    Yields:
        Row numbers in the order of their choice, in blocks of about a hundredth of ``size``, none twice.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(points), (), generator=generator).to(points.device)
    with full_float32(points.device):
        x = points.float()
        if x.shape[1] > PROJECTED:
            x = x @ torch.randn(x.shape[1], PROJECTED, generator=generator).to(x)
        x = x - x.mean(dim=0)
        norms = x.square().sum(dim=1)
    distance = torch.full_like(norms, torch.inf)
    chosen = [first]
    for n in range(1, size + 1):
        last = chosen[-1]
        if n % max(1, size // 100) == 0 or n == size:
            yield torch.stack(chosen)
            chosen = []
        if n < size:
            with full_float32(points.device):
                distance = torch.minimum(distance, torch.addmv(norms + norms[last], x, x[last], alpha=-2))
            distance[last] = -torch.inf  # also where rounding leaves a chosen point away from itself
            chosen.append(distance.argmax())
