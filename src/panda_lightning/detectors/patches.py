"""The patches of normal images for a coreset: what memory they and the choice among them take, and how they come."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from panda_lightning.detectors.checks import require_finite
from panda_lightning.networks.pyramid import level_strides
from panda_lightning.runtime.features import on_device
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.processes import world_size
from panda_lightning.runtime.sizes import in_words
from panda_lightning.runtime.systems import memory_of
from panda_lightning.search.coreset import BLOCK, PROJECTED, Points, Reduced, memory_for, memory_in_chunks
from panda_lightning.types import PandaError

_weakly: Any = reductions.StorageWeakRef
SLACK = 1.5  # activations, and what libraries take for themselves and allocators keep (experiments/bench/memory.py)


@dataclass(frozen=True)
class Plan:
    """How the patches are taken.

    Attributes:
        count: Of all images; where sizes differ, about so many.
        dim: Numbers of each.
        dtype: In which they are kept.
        portion: Images that pass the network at a time.
        chunks: How many the stream has; of one, all patches are held at the same time.
    """

    count: int
    dim: int
    dtype: torch.dtype
    portion: int
    chunks: int


def planned(detector: Any) -> Plan:
    """Say, before any image passes the network, what memory patches and choice take; look for a way if that is less.

    Args:
        detector: A PatchCore that is to make its bank.

    Raises:
        PandaError: If neither ``coreset_gb`` nor the device has so much, saying what helps.
    """
    data, strategy, world = detector.data, detector.trainer.strategy, detector.trainer.world_size
    images, size = len(data.normal_images), data.view.usual
    one = torch.zeros(1, 3, *size, dtype=torch.uint8, device=detector.device)
    with LiveBytes() as once:  # which folds the network's layers
        detector.embed({"image": one})
    with LiveBytes() as live:
        _, each, dim = detector.embed({"image": one}).shape
    count, largest = images * each, 1.0
    if data.view.sides is None:
        sides = data.normal_dataloader().dataset.shapes
        count = int((-(-sides // min(level_strides(detector.backbone, detector.levels)))).prod(axis=1).sum())
        largest = float(sides.prod(axis=1).max()) / math.prod(size)
    dtype = torch.float16 if detector.half_bank else torch.float32
    portion = min(detector.backbone.cached(one.expand(data.eval_batch_size, -1, -1, -1)), data.eval_batch_size)
    passing = int(largest * (SLACK * portion * live.most + data.eval_batch_size * one.numel())) + once.most
    chosen, patch = detector._size(count), dim * dtype.itemsize
    held = -(-images // world) * count // images  # by a process
    choice, chunks = _memory(held, count, chosen, dim, dtype.itemsize, world), 1
    if detector.coreset_gb is not None and choice > detector.coreset_gb * 2**30:
        chunks = _chunks(detector, choice, count, chosen, dim, dtype.itemsize)
        choice = memory_in_chunks(count, chosen, chunks, dim, dtype.itemsize)
    most = max(choice, held * patch + passing) if chunks == 1 else choice + passing
    memory = memory_of(detector.device)
    if not strategy.reduce_boolean_decision(memory is None or most <= memory[0]):
        free = memory[0] if memory else 0
        raise PandaError(
            f"{count} normal patches and the selection of {chosen} of them take {in_words(most)} on "
            f"{detector.device}, but {in_words(free) if memory else 'less'} are free: set "
            f"{_advice(detector, count, chosen, dim, dtype.itemsize, free - passing)}."
        )
    about = "about " if data.view.sides is None else ""
    shared = f", {in_words(held * patch)} of them on each of {world} processes" if world > 1 else ""
    way = f"in {chunks} chunks, the patches kept and" if chunks > 1 else "with"
    rank_zero_info(
        f"{detector.method}: {about}{count} patches of {images} normal images take {in_words(count * patch)}{shared}; "
        f"{way} the choice of {chosen} they take {in_words(choice)}, and the {portion} images that pass the network at "
        f"a time {in_words(passing)}: {in_words(most)} at most at the same time{detector._tiles_in_words(size)}."
    )
    return Plan(count, dim, dtype, portion, chunks)


def _memory(held: int, count: int, chosen: int, dim: int, itemsize: int, world: int) -> int:
    """Bytes of the patches that a process holds and of the choice of some of all, or of what is chosen."""
    patch = dim * itemsize
    if chosen == count:
        return (held + (count if world > 1 else 0)) * patch + min(BLOCK, held * patch)
    others = 4 * min(dim, PROJECTED) * chosen if world > 1 else 0  # all that is chosen, where it is not its own
    bank = chosen + (-(-chosen * held // count) if world > 1 else 0)
    return max(memory_for(held, dim, itemsize) + others, held * patch + bank * patch)


def _chunks(detector: Any, whole: int, count: int, chosen: int, dim: int, itemsize: int) -> int:
    """The fewest chunks for which ``coreset_gb`` is enough, where all at once take ``whole`` bytes."""
    world = detector.trainer.world_size
    given = (
        f"coreset_gb={detector.coreset_gb:g} is less than the {in_words(whole)} that {count} normal patches and "
        f"the selection of {chosen} of them take"
    )
    if world > 1:
        raise PandaError(
            f"{given} on each of {world} processes, and several processes cannot select in chunks: give "
            f"{_gib(whole)} or more."
        )
    sizes = {chunks: memory_in_chunks(count, chosen, chunks, dim, itemsize) for chunks in _possible(count, chosen)}
    found = next((chunks for chunks, size in sizes.items() if size <= detector.coreset_gb * 2**30), None)
    if found is None:
        least = min(whole, *sizes.values())
        raise PandaError(f"{given}, and in chunks they take {in_words(least)} or more: give {_gib(least)} or more.")
    return found


def _possible(count: int, chosen: int) -> range:
    return range(2, max(2, -(-count // chosen)) + 1)


def _gib(size: float) -> str:
    """Bytes in GiB, rounded up to three digits."""
    gib = size / 2**30
    digits = 2 - math.floor(math.log10(gib))
    return f"{math.ceil(gib * 10**digits) / 10**digits:g}"


def _advice(detector: Any, count: int, chosen: int, dim: int, itemsize: int, free: int) -> str:
    found = [] if detector.half_bank else ["model.half_bank=true"]
    least = min(memory_in_chunks(count, chosen, chunks, dim, itemsize) for chunks in _possible(count, chosen))
    if detector.trainer.world_size == 1 and detector.coreset_gb is None and least <= free:
        found = [f"model.coreset_gb={math.floor(free / 2**30 * 100) / 100:g}", *found]
    return " or ".join([*found, "a smaller data.train_limit"])


def collected(detector: Any, portion: int, into: Points | Reduced) -> tuple[Tensor, Tensor]:
    """Take in the patches of this process's normal images as they come.

    Args:
        detector: A PatchCore.
        portion: Images that pass the network at a time.
        into: What takes them.

    Returns:
        Numbers of the images in their order (N,), and how many patches each has (N,), on the patches' device.

    Raises:
        PandaError: If they are not finite numbers.
    """
    seen: list[tuple[int, int]] = []
    most = torch.zeros((), device=detector.device)

    def take(part: Any, numbers: list[int]) -> None:  # whose patches are gone when the next pass the network
        for number, patches in zip(numbers, detector.embed(part), strict=True):
            if number >= 0:
                torch.maximum(most, torch.stack(patches.aminmax()).abs().amax(), out=most)  # NaN stays
                try:
                    into.append(patches)
                except PandaError:  # a choice among them, in chunks, which one process makes alone
                    require_finite(detector, most)
                    raise
                seen.append((number, len(patches)))

    loader = detector.data.normal_dataloader()
    with torch.no_grad(), detector.trainer.precision_plugin.forward_context():
        for batch in on_device(detector.trainer, loader, "Normal features"):
            numbers = batch["index"].tolist()
            for start in range(0, len(numbers), portion):
                here = slice(start, start + portion)
                take({name: values[here] for name, values in batch.items()}, numbers[here])
    require_finite(detector, most)
    images, counts = torch.tensor(seen, dtype=torch.long, device=detector.device).view(-1, 2).T.contiguous()
    return images, counts


def numbered(images: Tensor, counts: Tensor) -> tuple[Tensor | None, Tensor, Tensor, int]:
    """Numbers of patches, in the order of the images, over all processes; every process must call it.

    Args:
        images: (n,) numbers of this process's images, in the order of its patches.
        counts: (n,) how many patches each has.

    Returns:
        Of each of its patches the number, (M,), or None where it has all, in their order; numbers of all images (N,),
        ascending, the number of each one's first patch (N,), and how many patches there are.
    """
    every, each = gather([(images, counts)])
    firsts = each.cumsum(0) - each
    if world_size() == 1 and torch.equal(every, images):
        return None, every, firsts, int(each.sum())
    own = firsts[torch.searchsorted(every, images)] - (counts.cumsum(0) - counts)
    numbers = own.repeat_interleave(counts)
    numbers += torch.arange(len(numbers), device=numbers.device)
    return numbers, every, firsts, int(each.sum())


def in_words_of(size: int, count: int, dim: int, radius: float, before: float, chunks: int = 1) -> str:
    """How well chosen patches stand for all, and how well any could.

    Args:
        size: How many were chosen.
        count: Of how many.
        dim: Numbers of each.
        radius: Their covering radius, of all patches or of what chunks left.
        before: The largest covering radius of what a chunk left, or the same again where there were none.
        chunks: How many there were.
    """
    what = f"distances after projection to {PROJECTED} dimensions" if dim > PROJECTED else "distances of features"
    reached, least = (radius + before if chunks > 1 else radius), max(radius, before) / 2
    times = f", so this radius is at most {reached / least:.2f} times the smallest possible" if least else ""
    way = f" in {chunks} chunks" if chunks > 1 else ""
    return (
        f"All {count} patches are within {reached:.4g} of the {size} chosen{way}; no choice of {size} has a radius "
        f"below {least:.4g}{times} ({what})"
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Counts the bytes of the tensors that are made under it and live at the same time.

    What libraries take for themselves inside an operation is not seen.

    Attributes:
        most: The largest number so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.most = 0
        self._live: dict[int, tuple[Any, int]] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._live[storage._cdata] = (_weakly(storage), storage.nbytes())
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return found
