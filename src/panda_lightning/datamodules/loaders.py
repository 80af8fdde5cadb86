"""Loaders that know of processes and of resumed epochs."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from panda_lightning.pictures.images import GAP
from panda_lightning.pictures.shapes import batches
from panda_lightning.types import Batch


def to_gpu(trainer: Any) -> bool:
    """Whether batches are copied to a GPU, which pinned memory lets happen while it works."""
    return bool(trainer and trainer.strategy.root_device.type == "cuda")


class ShardedSampler(DistributedSampler[int]):
    """Rows of this process: one order for any number of processes, dealt out like cards.

    Without shuffling nothing is repeated, and processes may hold different numbers of rows. With shuffling each epoch
    has its permutation, and the last round is filled up with -1, so that all processes make the same steps. Of no rows
    each process gets one -1, so that a validation of nothing takes place. (The base class is torch's so that Lightning
    leaves the sampler alone; its repeats are what this one avoids.)

    Where images have several sizes, each step of all processes has images of one: batch after batch is dealt out, in
    order of the sizes, or with shuffling in any. One that is not full is filled up with -1 until processes have as many
    rows, and with GAP, which is no row, to the loader's batch.

    Args:
        size: Number of rows.
        world: Number of processes.
        rank: This one.
        shuffle: See above.
        seed: Of the permutations.
        kinds: (N,) numbers of the images' sizes; None where all have one.
        batch: Rows of a step on each process, as the loader has it; counts with ``kinds`` alone.
    """

    def __init__(
        self,
        size: int,
        world: int,
        rank: int,
        shuffle: bool,
        seed: int = 0,
        kinds: Tensor | None = None,
        batch: int = 1,
    ) -> None:
        self.size, self.world, self.rank, self.shuffle, self.seed = size, world, rank, shuffle, seed
        self.kinds, self.batch = kinds, batch
        self._steps = 0 if kinds is None else len(batches(torch.arange(size), kinds, batch * world))
        self.epoch = 0
        self.skip = 0  # rows of this process to leave out at the start, see ResumableLoader

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.size) if self.size else torch.full((self.world,), -1)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.shuffle:
            order = torch.randperm(self.size, generator=generator)
        if self.kinds is not None:
            steps = torch.stack([self._filled(rows) for rows in batches(order, self.kinds, self.batch * self.world)])
            order = (steps[torch.randperm(len(steps), generator=generator)] if self.shuffle else steps).flatten()
        elif self.shuffle:
            order = torch.cat([order, order.new_full((-self.size % self.world,), -1)])
        mine = order[self.rank :: self.world][self.skip :]
        return (row for some in torch.split(mine, 4096) for row in some.tolist())  # not a million numbers at once

    def _filled(self, rows: Tensor) -> Tensor:
        """A step's rows of all processes."""
        fill = -len(rows) % self.world
        gaps = self.batch * self.world - len(rows) - fill
        return torch.cat([rows, rows.new_full((fill,), -1), rows.new_full((gaps,), GAP)])

    def __len__(self) -> int:
        if not self.size:
            return 1
        if self.kinds is not None:
            return self.batch * self._steps
        missing = self.size - self.rank
        return -(-self.size // self.world) if self.shuffle else max(0, -(-missing // self.world))


class PinningLoader(DataLoader[Batch]):
    """A loader that pins its batches, but not where the frozen layers' output is already on the GPU.

    A run may put it there after Lightning has made the loader and its iterator, so this is seen in each epoch when the
    first batch is asked for.
    """

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        hidden = getattr(self.dataset, "hidden", None)
        self.pin_memory = self.pin_memory and (hidden is None or not hidden.is_cuda)
        yield from super().__iter__()


class ResumableLoader(PinningLoader):
    """A loader that goes on in the middle of an epoch.

    A Detector gives it the loop of its run, which knows the number of the batch to come. Lightning also keeps the
    loader's place in every checkpoint, and brings it back for other modules; but not where ``configure_optimizers``
    asked for the number of steps, and so for the loader, and with a batch too many where its step failed.

    Batches are drawn from the sampler when the first is asked for, not when an iterator is made, since Lightning tells
    the sampler the epoch, and its loop the batch, in between.
    """

    loop: Any = None  # the Trainer's fit_loop
    done = 0  # batches given out in this epoch
    resumed: tuple[int, int] = (-1, 0)  # epoch, and batches given out in it before

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sampler: Any = self.sampler
        epoch, done = self.resumed if self.loop is None else (sampler.epoch, self.loop.batch_idx + 1)
        sampler.skip = done % len(self) * (self.batch_size or 1) if epoch == sampler.epoch else 0
        self.resumed, self.done = (-1, 0), sampler.skip // (self.batch_size or 1)
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The place in the training images' order, the same on every process."""
        sampler: Any = self.sampler
        return {"epoch": sampler.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at this place, once."""
        self.resumed = (state["epoch"], state["done"])
