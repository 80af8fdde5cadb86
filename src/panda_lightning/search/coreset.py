"""A few points that stand for many: greedy k-centre selection, in memory that is known beforehand."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from panda_lightning.runtime.float32 import full_float32
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.processes import of_each, world_size
from panda_lightning.types import PandaError

PROJECTED = 128  # dimensions in which distances are taken
FARTHEST = 1 / 32  # share of the points, at least 256, among which choices are made between looks at all of them
MOST = 1.2  # bytes that points and choice may take, as a multiple of the points' own in float32
ROWS = 1024  # points of a piece, whose products with as many others stay in a CPU's caches
LOOK = 44  # bytes of a point besides: its distance and number, when it was compared, and the search for the farthest
BLOCK = 1 << 26  # bytes of a block; a C library gives those of 32 MiB and more back to the system when they go


class Points:
    """Points (N, D) as they come, in blocks that are let go of one by one: none is ever held twice.

    Args:
        dim: D.
        dtype: Of what is kept.
        device: Where.
        block: How many points a block has; None is as many as fit into 64 MiB.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device, block: int | None = None) -> None:
        self.dim, self.dtype, self.device = dim, dtype, device
        self._each = block or max(1, BLOCK // (dim * dtype.itemsize * ROWS)) * ROWS
        self._blocks: list[Tensor] = []
        self._count = 0

    @classmethod
    def of(cls, points: Tensor) -> "Points":
        """Points (N, D) that are there already, as one block."""
        found = cls(points.shape[1], points.dtype, points.device, max(1, len(points)))
        found._blocks, found._count = [points.detach()], len(points)
        return found

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Tensor) -> None:
        """Take in a copy of some more (n, D), of any strides and type."""
        while len(rows):
            start = self._count % self._each
            if self._count == self._each * len(self._blocks):
                self._blocks.append(torch.empty((self._each, self.dim), dtype=self.dtype, device=self.device))
            some = rows[: self._each - start]
            self._blocks[-1][start : start + len(some)].copy_(some)
            self._count, rows = self._count + len(some), rows[len(some) :]

    def pieces(self) -> Iterator[Tensor]:
        """All of them, in order, some at a time."""
        for i, block in enumerate(self._blocks):
            yield from torch.split(block[: self._count - i * self._each], ROWS)

    def take(self, rows: Tensor) -> Tensor:
        """Those of these numbers (n,), (n, D)."""
        found = torch.empty((len(rows), self.dim), dtype=self.dtype, device=self.device)
        for i in range(len(self._blocks)):
            self._put(i, rows, found)
        return found

    def moved(self, rows: Tensor) -> Tensor:
        """The same, and all are let go of."""
        found = torch.empty((len(rows), self.dim), dtype=self.dtype, device=self.device)
        for i in range(len(self._blocks)):
            self._put(i, rows, found)
            self._blocks[i] = found[:0]
        self.clear()
        return found

    def clear(self) -> None:
        """Let go of all, but for one block, which the next will come into."""
        self._blocks, self._count = [block for block in self._blocks[:1] if len(block)], 0

    def _put(self, i: int, rows: Tensor, found: Tensor) -> None:
        """Write those that lie in a block to their places."""
        if len(self._blocks) == 1:
            torch.index_select(self._blocks[0], 0, rows, out=found)
            return
        here = (rows // self._each == i).nonzero().flatten()
        for places in torch.split(here, 16 * ROWS):
            found[places] = self._blocks[i][rows[places] - i * self._each]


def memory_for(count: int, dim: int, itemsize: int) -> int:
    """Bytes that ``count`` points of ``dim`` numbers, and the greedy choice among them, take at most.

    Among them are some MiB for a piece of points and its products, however few points there are.
    """
    space = min(dim, PROJECTED)
    candidates = min(count, max(256, int(count * FARTHEST)) + 1) * (6 * space + 48)  # with a copy of half of them
    each = dim * itemsize + (4 * PROJECTED if _keeps_projection(dim, itemsize) else 0) + LOOK
    return count * each + candidates + 4 * ROWS * (2 * ROWS + 2 * dim + 6 * space) + 4 * dim * PROJECTED


def _keeps_projection(dim: int, itemsize: int) -> bool:
    """Whether points are projected once, and not at each look: where all then takes no more than ``MOST``."""
    candidates = FARTHEST * (6 * PROJECTED + 48)
    return dim > PROJECTED and dim * itemsize + 4 * PROJECTED + LOOK + candidates <= MOST * 4 * dim


@torch.no_grad()
def greedy_coreset(
    points: Tensor | Points, size: int, seed: int = 0, numbers: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Choose points one after the other, each the farthest from all chosen so far.

    .. math:: i_{n+1} = \arg\max_i \min_{j \le n} \lVert x_i - x_{i_j} \rVert^2

    The first is drawn by the seed; of equally far ones the first is taken. Points of more than ``PROJECTED`` dimensions
    are projected to so many by a Gaussian matrix of the same seed, which keeps distances to within some percent
    (Johnson and Lindenstrauss). This is Algorithm 1 of PatchCore (Roth et al., CVPR 2022).

    The distance r of point k + 1 is the covering radius of the first k: all points are within r of them. No k points
    have one below r / 2, since of k + 1 points at distances of r or more two share a centre (Gonzalez, Clustering to
    minimize the maximum intercluster distance, 1985). All this is of projected points.

    Distances only fall, so as long as the farthest of the farthest points is beyond what all others were at the last
    look, it is the farthest of all: most choices need to look at a thirty-second of the points. For the same reason a
    look brings only those up to date that were far when they were last compared.

    Args:
        points: (N, D), on any device; no copy is made of them. See memory_for.
        size: How many to choose, 1 to N.
        seed: Of first point and projection.
        numbers: (N,) of the points among those of all processes, which then choose from all of them together: each
            calls this with its own, and all get the same. Rounding apart, one process with all points would choose the
            same. None: this process chooses alone, and row numbers are the numbers.

    Yields:
        Numbers in the order of their choice, in blocks of about a hundredth of ``size``, none twice; and the squared
        distance of each from those before it, infinite for the first.
    """
    held = points if isinstance(points, Points) else Points.of(points)
    together = numbers is not None and world_size() > 1
    count = int(of_each(torch.tensor([len(held)], device=held.device)).sum()) if together else len(held)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(count, (1,), generator=generator).to(held.device)
    matrix = torch.randn(held.dim, PROJECTED, generator=generator) if held.dim > PROJECTED else None
    with full_float32(held.device):
        x = _Coordinates(held, matrix, count, together)
    picks = _farthest_first(x, size, count, first, numbers, together)
    waiting: list[tuple[Tensor, Tensor]] = []
    for block in torch.split(torch.arange(size), max(1, size // 100)):
        while sum(len(found) for found, _ in waiting) < len(block):
            with full_float32(held.device):
                waiting.append(next(picks))
        columns = [torch.cat(column) for column in zip(*waiting, strict=True)]
        yield columns[0][: len(block)], columns[1][: len(block)]
        waiting = [(columns[0][len(block) :], columns[1][len(block) :])]


class _Coordinates:
    """What distances are taken of: points, projected where they have many dimensions, less their mean.

    They are made anew, piece by piece, wherever they are wanted, unless they take little beside the points.
    """

    def __init__(self, points: Points, matrix: Tensor | None, count: int, together: bool) -> None:
        self._points = points
        self._matrix = None if matrix is None else matrix.to(points.device)
        mean = torch.zeros(points.dim, dtype=torch.float64)
        for piece in points.pieces():
            mean += piece.sum(dim=0, dtype=torch.float32).cpu().double()
        mean = (of_each(mean.to(points.device)).sum(dim=0).cpu() if together else mean) / count
        self._mean = (mean if matrix is None else mean @ matrix.double()).float().to(points.device)
        self.dim, self.device = len(self._mean), points.device
        self._kept: Points | None = None
        if _keeps_projection(points.dim, points.dtype.itemsize):
            kept = Points(self.dim, torch.float32, points.device)
            for piece in points.pieces():
                kept.append(self._made_of(piece))
            self._kept = kept

    def __len__(self) -> int:
        return len(self._points)

    def _made_of(self, piece: Tensor) -> Tensor:
        found = piece.float()
        return (found if self._matrix is None else found @ self._matrix) - self._mean

    def pieces(self) -> Iterator[Tensor]:
        """All of them, in order, some at a time."""
        return self._kept.pieces() if self._kept is not None else map(self._made_of, self._points.pieces())

    def take(self, rows: Tensor) -> Tensor:
        """Those of these rows (n,), (n, D)."""
        if self._kept is not None:
            return self._kept.take(rows)
        found = torch.empty((len(rows), self.dim), device=self.device)
        for into, some in zip(torch.split(found, ROWS), torch.split(rows, ROWS), strict=True):
            into.copy_(self._made_of(self._points.take(some)))
        return found


def _farthest_first(
    x: _Coordinates, size: int, total: int, first: Tensor, numbers: Tensor | None, together: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """See greedy_coreset; yields as many at once as one look allows."""
    distances = _Distances(x, min(max(256, int(total * FARTHEST)), total - 1), numbers, together)
    rows = first if numbers is None else (numbers == first).nonzero().flatten()
    name, far, near = _table(rows, numbers, distances.now, x, together)
    order, done = torch.zeros(1, dtype=torch.long, device=x.device), 1
    yield first, far[:1]
    while done < size:
        own = torch.full_like(name, -1)
        own[torch.searchsorted(name, rows if numbers is None else numbers[rows])] = rows
        mine = own[order]
        distances.choose(mine[mine >= 0], near[order])
        del near
        rows, others = distances.farthest()
        name, far, near = _table(rows, numbers, distances.now, x, together)
        order, value = _choices(near, far, others, size - done, together)
        yield name[order], value
        done += len(order)


class _Distances:
    """Squared distances (N,) of points to the nearest chosen one, brought up to date where they may be the largest.

    Attributes:
        now: They, or what they were when there were fewer chosen ones, which is more; -inf of what is chosen.
    """

    AHEAD = 4  # times as many points as are to be chosen among are brought up to date at once

    def __init__(self, x: _Coordinates, count: int, numbers: Tensor | None, together: bool) -> None:
        self._x, self._count, self._numbers, self._together = x, count, numbers, together
        self.now = torch.full((len(x),), torch.inf, device=x.device)
        self._seen = torch.zeros(len(x), dtype=torch.int32, device=x.device)  # of the groups of chosen points below
        self._chosen: list[Tensor] = []  # their rows, or where they are of several processes, themselves

    def choose(self, rows: Tensor, points: Tensor) -> None:
        """Count points (n, D) among the chosen ones; those of this process have these rows."""
        self._chosen.append(points if self._together else rows)
        self.now[rows] = -torch.inf  # also where rounding would leave a chosen point away from itself

    def farthest(self) -> tuple[Tensor, float]:
        """Rows of this process among the farthest of all, by number, at most ``count``, and what no others exceed."""
        lowest, before, count = torch.finfo(torch.float32).min, torch.inf, len(self.now)
        ahead = -(-self.AHEAD * self._count // (world_size() if self._together else 1))
        while True:
            least = self.now.topk(ahead).values[-1:] if ahead < count else self.now.new_full((1,), lowest)
            bound = max(float(self._of_all(least, 1)[0]), lowest)
            self._update((self.now >= bound).nonzero().flatten())
            top = self.now.topk(min(self._count + 1, count))
            values = self._of_all(top.values, self._count + 1)[: self._count + 1]
            largest, found = float(values[0]), int((values > bound).sum())
            if math.isnan(largest):
                raise PandaError(
                    "some of these points have no distances, since their values are not numbers, or too large for "
                    "float32: check the network's weights."
                )
            if largest >= bound and (4 * found >= self._count or bound == before):
                break
            before = bound
        others = max(float(values[-1]), bound)
        if largest > others:
            rows = top.indices[top.values > others].sort().values
            return rows if self._numbers is None else rows[self._numbers[rows].argsort()], others
        rows = (self.now == largest).nonzero().flatten()  # many are equally far: the first of them
        if self._numbers is not None:
            rows = rows[self._numbers[rows].argsort()]
        if self._together:
            return rows[:1], others
        return rows[: self._count], float(np.nextafter(np.float32(largest), np.float32(-np.inf)))

    def _of_all(self, values: Tensor, count: int) -> Tensor:
        """Values of all processes, each at most ``count``, descending."""
        if not self._together:
            return values
        padded = values.new_full((count,), -torch.inf)
        padded[: len(values)] = values
        return of_each(padded).flatten().sort(descending=True).values

    def _update(self, rows: Tensor) -> None:
        """Bring the distances of these rows (n,) up to date."""
        seen = self._seen[rows]
        for group in torch.bincount(seen)[: len(self._chosen)].nonzero().flatten().tolist():
            some = rows[seen == group]
            for new in torch.split(torch.cat(self._chosen[group:]), 4 * ROWS):
                self._compare(some, new if self._together else self._x.take(new))
        self._seen[rows] = len(self._chosen)

    def _compare(self, rows: Tensor, chosen: Tensor) -> None:
        parts = [(some, some.square().sum(dim=1)) for some in torch.split(chosen, ROWS)]
        for piece in torch.split(rows, ROWS):
            points = self._x.take(piece)
            near = torch.stack([torch.addmm(n, points, some.T, alpha=-2).amin(dim=1) for some, n in parts]).amin(dim=0)
            self.now[piece] = torch.minimum(self.now[piece], near + points.square().sum(dim=1))


def _table(
    rows: Tensor, numbers: Tensor | None, distance: Tensor, x: _Coordinates, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (n,), ascending as the rows', distances (n,) and coordinates (n, D) of the points that processes name."""
    if numbers is None:
        return rows, distance[rows], x.take(rows)
    own = numbers[rows], distance[rows], x.take(rows)
    if not together:
        return own
    name, far, near = gather([own])
    return name, far, near


def _choices(near: Tensor, far: Tensor, others: float, most: int, together: bool) -> tuple[Tensor, Tensor]:
    """Places in the table of points that are chosen one after the other, and their distances when they are.

    Process 0 chooses for all, so that different machines may round differently.
    """
    if together and torch.distributed.get_rank() > 0:
        order, value = torch.empty(0, dtype=torch.long, device=far.device), far[:0]
    else:
        order, value = _chosen(near, far, others, most)
    if together:
        _, order, value = gather([(torch.arange(len(order), device=far.device), order, value)])
    return order, value


def _chosen(near: Tensor, far: Tensor, others: float, most: int) -> tuple[Tensor, Tensor]:
    norms, place = near.square().sum(dim=1), torch.arange(len(far), device=far.device)
    order: list[Tensor] = []
    values: list[Tensor] = []
    step = 1 if far.device.type == "cpu" else 32  # a GPU is waited for once a step, and not for every choice
    while len(order) < most:
        before = len(order)
        for _ in range(min(step, most - before)):
            value, at = far.max(dim=0, keepdim=True)
            order.append(place[at])
            values.append(value)
            far = torch.minimum(far, torch.addmm(norms + norms[at], near[at], near.T, alpha=-2)[0])
            far[at] = -torch.inf
        beyond = max(int((torch.cat(values[before:]) > others).sum()), 0 if before else 1)  # they only fall
        order, values = order[: before + beyond], values[: before + beyond]
        if before + beyond < min(before + step, most):
            break
        if len(order) % 32 == 0:  # those that are no farther than others have no more part in it
            left = (far > others).nonzero().flatten()
            if 2 * len(left) < len(far):
                near, norms, far, place = near[left], norms[left], far[left], place[left]
                if not len(left):
                    break
    return torch.cat(order), torch.cat(values)


class Reduced:
    """Points that come in a stream, of which so many are kept that a choice among these is good for all.

    Each chunk of the stream is reduced by greedy choice to k points, or to fewer whose covering radius is at most d,
    the largest distance so far of a choice k + 1: so all of the chunk are within d of them. Choose k of what is left of
    all chunks, greedily again, with covering radius r: every point is within d + r of one of these. No k points have a
    covering radius below max(d, r) / 2 (see greedy_coreset), so d + r is at most 4 times the least possible.
    Sources: Gonzalez 1985 for greedy choice; Malkomes et al., Fast distributed k-center clustering with outliers on
    massive data, NeurIPS 2015, for its use in parts and on what they leave. Distances are those of projected points.

    Args:
        size: k, how many are to be chosen in the end, or more.
        chunk: Points of a chunk.
        dim: Of points.
        dtype: Of what is kept.
        device: Where.
        seed: Of first points, and of the projection.

    Attributes:
        kept: What is left of the chunks so far, at most k of each.
        squared: d^2.
    """

    def __init__(self, size: int, chunk: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._size, self._chunk, self._seed = size, chunk, seed
        self._points = Points(dim, dtype, device, chunk)
        self._reduced = 0  # points of the chunks that are done with
        self._rows: list[Tensor] = []
        self.kept = Points(dim, dtype, device, size)
        self.squared = 0.0

    def __len__(self) -> int:
        return self._reduced + len(self._points)

    def append(self, rows: Tensor) -> None:
        """Take in some more (n, D)."""
        while len(rows):
            room = self._chunk - len(self._points)
            self._points.append(rows[:room])
            if len(rows) >= room:
                self.finish()
            rows = rows[room:]

    def finish(self) -> Tensor:
        """Reduce what is left over; returns the numbers in the stream of what is kept, (n,)."""
        count = len(self._points)
        rows = torch.arange(count, device=self._points.device)
        if count > self._size:
            chosen: list[Tensor] = []
            for some, far in greedy_coreset(self._points, self._size + 1, self._seed):
                chosen.append(some[far > self.squared])
                if len(chosen[-1]) < len(some):
                    break
            else:
                self.squared, chosen[-1] = float(far[-1]), chosen[-1][:-1]
            rows = torch.cat(chosen)
        for some in torch.split(rows, ROWS):
            self.kept.append(self._points.take(some))
        self._rows.append(rows + self._reduced)
        self._reduced += count
        self._points.clear()
        return torch.cat(self._rows)


def memory_in_chunks(count: int, size: int, chunks: int, dim: int, itemsize: int) -> int:
    """Bytes that Reduced takes at most for ``count`` points in so many chunks, with the choice from what is left."""
    chunk = -(-count // chunks)
    left = min(count, chunks * size)
    kept = left * (dim * itemsize + 16)  # with their numbers, once more while these are put together
    return max(kept + memory_for(chunk, dim, itemsize), memory_for(left, dim, itemsize), kept + size * dim * itemsize)


def everywhere(points: Points, numbers: Tensor | None, chosen: Tensor) -> Tensor:
    """The points (n, D) of these numbers (n,), on every process; all are let go of. See greedy_coreset.

    Args:
        points: Of this process.
        numbers: (N,) of its points among those of all; None where there are no others.
        chosen: Numbers of points.
    """
    if numbers is None:
        return points.moved(chosen)
    order = numbers.argsort()
    ascending = numbers[order]
    at = torch.searchsorted(ascending, chosen).clamp(max=max(0, len(order) - 1))
    places = (ascending[at] == chosen).nonzero().flatten() if len(order) else order
    mine = points.moved(order[at[places]] if len(order) else order)
    del order, ascending
    if world_size() == 1:
        return mine
    whole = torch.empty((len(chosen), points.dim), dtype=points.dtype, device=points.device)
    for start in range(0, len(chosen), 4 * ROWS):  # not all at once, which would take three times as much
        here = (places >= start) & (places < start + 4 * ROWS)
        _, some = gather([(places[here], mine[here])])
        whole[start : start + len(some)] = some
    return whole


def kmeans(points: Tensor, count: int) -> Tensor:
    """Centres (count, D) of k-means clusters of points (N, D) on the CPU, the same at every call."""
    from sklearn.cluster import KMeans  # slow to import

    return torch.from_numpy(KMeans(count, n_init=1, random_state=0).fit(points.numpy()).cluster_centers_)
