"""A few points that stand for many: greedy k-centre selection."""

from collections.abc import Iterator

import torch
from torch import Tensor

from panda_lightning.search.knn import full_float32

PROJECTED = 128  # dimensions in which distances are taken
FARTHEST = 1 / 32  # share of the points, at least 256, among which choices are made between looks at all of them


@torch.no_grad()
def greedy_coreset(points: Tensor, size: int, seed: int = 0) -> Iterator[Tensor]:
    r"""Choose points one after the other, each the farthest from all chosen so far.

    .. math:: i_{n+1} = \arg\max_i \min_{j \le n} \lVert x_i - x_{i_j} \rVert^2

    The first is drawn by the seed. Points of more than ``PROJECTED`` dimensions are projected to so many by a Gaussian
    matrix of the same seed, which keeps distances to within some percent (Johnson and Lindenstrauss). This is
    Algorithm 1 of PatchCore (Roth et al., CVPR 2022).

    Distances only fall, so as long as the farthest of the farthest points is beyond what all others were at the last
    look, it is the farthest of all: most choices need to look at a thirty-second of the points.

    Args:
        points: (N, D), on any device.
        size: How many to choose, 1 to N.
        seed: Of first point and projection.

    Yields:
        Row numbers in the order of their choice, in blocks of about a hundredth of ``size``, none twice.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(points), (1,), generator=generator).to(points.device)
    with full_float32(points.device):
        x = points.float()
        if x.shape[1] > PROJECTED:
            x = x @ torch.randn(x.shape[1], PROJECTED, generator=generator).to(x)
        x = x - x.mean(dim=0)
    picks = _farthest_first(x, first)
    for block in torch.split(torch.arange(size), max(1, size // 100)):
        with full_float32(x.device):
            rows = torch.cat([next(picks) for _ in block])
        yield rows


def _farthest_first(x: Tensor, first: Tensor) -> Iterator[Tensor]:
    """Row numbers (1,) of the points (N, D), for as long as they are asked for, at most N."""
    norms, distance = x.square().sum(dim=1), x.new_full((len(x),), torch.inf)
    count = min(max(256, int(len(x) * FARTHEST)), len(x) - 1)
    yield first
    chosen = first
    while True:
        # all points, a thousand at a time, against those chosen since the last look
        parts = zip(torch.split(x, 1024), torch.split(norms, 1024), strict=True)
        near = [torch.addmm(norms[chosen], some, x[chosen].T, alpha=-2).amin(dim=1) + n for some, n in parts]
        distance = torch.minimum(distance, torch.cat(near))
        distance[chosen] = -torch.inf  # also where rounding leaves a chosen point away from itself
        top = distance.topk(count + 1)
        rows, far, others = top.indices, top.values, float(top.values[-1])
        some, some_norms = x[rows], norms[rows]
        picked: list[Tensor] = []
        while not picked or float(far.max()) > others:
            place = far.argmax().view(1)
            picked.append(rows[place])
            yield picked[-1]
            distances = torch.addmm(some_norms + some_norms[place], some[place], some.T, alpha=-2)[0]
            far = torch.minimum(far, distances)
            far[place] = -torch.inf
        chosen = torch.cat(picked)
