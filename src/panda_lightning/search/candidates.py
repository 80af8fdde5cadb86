"""Rows that may be among the nearest, by matrix products in float32 or bfloat16 and a bound on their rounding."""

import math
import time
from copy import copy
from functools import cache
from statistics import median
from typing import NamedTuple, Self

import torch
from torch import Tensor

from panda_lightning.runtime.float32 import full_float32
from panda_lightning.runtime.systems import widenable

PARTS = {torch.float32: 1, torch.bfloat16: 2}  # numbers that stand for a squared norm
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}  # of a product, at most, relative to what it is rounded to
BLOCK = 2**20  # products that a CPU's caches hold
FASTER = 1.3  # how many times as fast bfloat16 must be
NONE = torch.iinfo(torch.int64).max  # comes after all packed ones


class Candidates(NamedTuple):
    """Groups of rows for B queries; all rows that may be among the k nearest are in them.

    Attributes:
        query: Numbers of queries, ascending (P,).
        group: A group of that query's, ascending (P,).
        counts: How many groups each query has (B,).
        size: Rows of a group.
        total: Rows of all groups; the last may have fewer than others.
    """

    query: Tensor
    group: Tensor
    counts: Tensor
    size: int
    total: int

    def of(self, queries: Tensor) -> Self:
        """Those of some queries, by a mask (B,), which are numbered anew."""
        kept = queries[self.query]
        number = queries.cumsum(0) - 1
        number = number[self.query[kept]]
        return self._replace(query=number, group=self.group[kept], counts=self.counts[queries])

    def of_one(self, query: int) -> Self:
        """Those of one query."""
        groups = self.group[self.query == query]
        return self._replace(query=torch.zeros_like(groups), group=groups, counts=self.counts[query : query + 1])


class Products:
    r"""The matrix-product form of squared distances, whose rounding is known.

    .. math:: F = |q|^2 + |b|^2 - 2 q \cdot b

    q and b are less the bank's mean, and F is one product: norms are further columns of both sides. In bfloat16 sides
    are rounded to q' and b', norms are two numbers each, sums are of float32 and rounded once at the end.

    Args:
        bank: (N, D), or (N, P, D) for rows in pieces, on the device that computes.
        mean: (D,) in float32.
        dtype: float32 or bfloat16.
    """

    def __init__(self, bank: Tensor, mean: Tensor, dtype: torch.dtype) -> None:
        self.mean, self.dtype = mean, dtype
        self.rows = mean.new_empty((*bank.shape[:-1], len(mean) + 2 * PARTS[dtype]), dtype=dtype)
        step, lost = max(1, BLOCK // 4 // math.prod(bank.shape[1:])), [mean.new_zeros(1)]
        for some, out in zip(torch.split(bank, step), torch.split(self.rows, step), strict=True):
            norm, gap = self._write(some, out, 0)
            lost.append(torch.where(gap > 0, gap / norm, 0).flatten())
        self.lost = torch.cat(lost).amax()  # of a row's norm, by rounding

    @property
    def count(self) -> int:
        """How many rows there are."""
        return math.prod(self.rows.shape[:-1])

    def of(self, pieces: Tensor) -> Self:
        """Those of some pieces (n,) of a bank in pieces."""
        some = copy(self)
        some.rows = self.rows[pieces]
        return some

    def _write(self, rows: Tensor, out: Tensor, norms: int) -> tuple[Tensor, Tensor]:
        """Write a side (..., D + 2 parts) of rows (..., D), in whose last columns ``norms`` come first or last.

        Returns:
            Norms of the rows less the mean, and of what rounding takes from them, (...).
        """
        centred = rows.float() - self.mean
        norm = torch.linalg.vector_norm(centred, dim=-1)
        rounded, *columns = torch.split(out, [centred.shape[-1], *[PARTS[self.dtype]] * 2], dim=-1)
        rounded.copy_(centred)
        rest = norm.square()
        for part in columns[norms].unbind(-1):
            part.copy_(rest)
            rest = rest - part
        columns[1 - norms].fill_(1)
        return norm, torch.linalg.vector_norm(centred - rounded, dim=-1)

    def candidates(self, queries: Tensor, k: int, group: int) -> Candidates:
        """All groups that may hold one of the k nearest rows.

        k groups hold a row that is no farther than the k-th of their least products says, so the k nearest are not
        farther either.

        Args:
            queries: (B, D).
            k: At most the number of groups.
            group: Rows that follow each other; the last group may have fewer.
        """
        side = self.rows.new_empty((len(queries), self.rows.shape[-1]))
        norm, gap = self._write(queries, side, 1)
        side[:, : queries.shape[1]] *= -2
        rows = self.rows.flatten(0, -2)
        step = max(1, BLOCK // len(queries) // group) * group if rows.device.type == "cpu" else len(rows)
        least = torch.cat([_least(some @ side.T, group) for some in torch.split(rows, step)])
        first = least.amin(dim=0, keepdim=True) if k == 1 else least.T.topk(k, largest=False, sorted=False).values.T
        kth = first.contiguous().view(self.dtype).amax(dim=0)
        wide = (widenable(t).double() for t in (kth, norm, gap, self.lost))
        most = reach(queries.shape[1], self.dtype, *wide).to(kth)
        near = least <= most.view(BITS[self.dtype])
        near[:k] |= most.isnan()  # a query that is no number has no neighbours
        places, query = near.nonzero(as_tuple=True)
        query, order = query.sort(stable=True)
        counts = query.new_zeros(len(queries)).scatter_add_(0, query, torch.ones_like(query))
        return Candidates(query, places[order], counts, group, len(rows))


def _least(products: Tensor, group: int) -> Tensor:
    """The bits of the least product of each group of rows (n, B), (n / group, B), rounded up.

    As whole numbers those of positive ones have the same order, and their least is found in a fifth of the time.
    Negative ones, which rounding makes, come before them in the reverse order: what is found is a product of the group.
    """
    bits = products.view(BITS[products.dtype])
    if group == 1:
        return bits
    whole = len(bits) // group * group
    least = bits[:whole].view(whole // group, group, bits.shape[1]).amin(dim=1)
    return torch.cat([least, bits[whole:].amin(dim=0, keepdim=True)]) if whole < len(bits) else least


def reach(dim: int, dtype: torch.dtype, kth: Tensor, norm: Tensor, gap: Tensor, lost: Tensor) -> Tensor:
    r"""What a row's product is at most if it is one of the k nearest.

    A product F differs from the squared distance d of the rows by at most

    .. math:: 2 |b| (|q - q'| + |q'| \rho) + \gamma (|q| + |b|)^2 + o |F|, \qquad \rho = \max_b |b - b'| / |b|.

    The first term is the rounding of both sides, by the norms of what it takes; gamma is that of sums of so many
    numbers in whatever order (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1, with half
    of float32's last digit for tensor cores, which may cut it off) and of norms; o that of the product's type.
    With |b| <= |q| + sqrt(d), the k-th least product gives a quadratic inequality for the k-th least distance, and this
    the largest product of a row that is not farther. float32's rounding of distances by differences is in it too, so
    that rows that are as far as the k-th by those are found.

    Args:
        dim: D.
        dtype: Of products.
        kth: k-th least product of each query, like all others in float64 (B,).
        norm: Of queries less the mean (B,).
        gap: Norms of what rounding took from queries (B,).
        lost: Largest share of a row's norm that rounding took.
    """
    n = 2 * dim + 16  # for a product, and for norms
    gamma = n / (2**24 - n) if dtype == torch.float32 else n / (2**23 - n) + 2.0**-16
    norm, gap, lost = (t * (1 + 2 * n / 2**24) for t in (norm, gap, lost))  # which were computed in float32
    slope = 2 * (gap + (norm + gap) * lost)
    half = slope / 2 + 2 * gamma * norm
    rest = kth + ROUNDED[dtype] * kth.abs() + slope * norm + 4 * gamma * norm.square()
    distance = (half + (half.square() + (1 - gamma) * rest.clamp(min=0)).sqrt()) / (1 - gamma)
    distance = distance * (1 + 4 * n / 2**24)
    most = distance.square() + slope * (norm + distance) + gamma * (2 * norm + distance).square()
    return most * (1 + ROUNDED[dtype])


@cache
def products_type(device: str) -> torch.dtype:
    """The type in which a kind of device names candidates fastest: bfloat16 where its products are, by measurement.

    What is found does not depend on it.
    """
    kind = torch.device(device)
    with full_float32(kind):
        return torch.bfloat16 if kind.type != "mps" and _sums_in_float32(kind) and _is_faster(kind) else torch.float32


def _is_faster(device: torch.device) -> bool:
    """Whether products in bfloat16 take so much less time than in float32."""
    rows, columns, dim = (512, 256, 64) if device.type == "cpu" else (2**14, 2**12, 512)
    numbers = torch.linspace(-1, 1, dim, device=device).expand(rows + columns, dim)  # drawn ones would change a seed's
    sides = [numbers.to(dtype).contiguous() for dtype in (torch.float32, torch.bfloat16)]
    ratios = []
    for _ in range(7):
        seconds = []
        for side in sides:
            start = time.perf_counter()
            float(_least(side[:rows] @ side[rows:].T, 64).amax())  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios) >= FASTER


def _sums_in_float32(device: torch.device) -> bool:
    """Whether products in bfloat16 are rounded once, at their end: of 4,096 ones, less half the last digit each."""
    ones = torch.full((16, 4096), 1 - 2.0**-8, dtype=torch.bfloat16, device=device)
    expected = float(ones[0, 0]) ** 2 * 4096
    return bool(((ones @ ones.T).double().cpu() / expected - 1).abs().max() <= 2.0**-8)


def total(bank: Tensor) -> Tensor:
    """About the sum of all rows (..., D), in float64 (D,): what is less than about their mean loses few digits."""
    pieces = torch.split(bank, max(1, 2**13 // max(1, math.prod(bank.shape[1:-1]))))
    sums = [piece.sum(dim=tuple(range(bank.ndim - 1)), dtype=torch.float32) for piece in pieces]
    return widenable(torch.stack(sums)).sum(dim=0, dtype=torch.float64)


def packed(distance: Tensor, row: Tensor) -> Tensor:
    """Distances that are not negative and their rows in one number each, ordered by distance, then by row."""
    return (distance.float().view(torch.int32).long() & 0x7FFFFFFF) << 32 | row


def unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The distances and rows of packed ones."""
    return (keys >> 32).int().view(torch.float32), keys & 0xFFFFFFFF
