"""GPUs as far as they can be had elsewhere: tensors that say they lie on ``mps`` or ``cuda``, and what waits for them.

Each holds a tensor of the CPU, on which torch's functions are called. Functions with a gradient of their own
(``autograd.Function``) and ``torch.func`` see no graph there, and autocast changes nothing: for these see
tests/test_fake_cuda.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, ddp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from panda_lightning.search import candidates, knn

MIXING = ("to", "copy_", "__getitem__", "__setitem__")  # take tensors of two devices
DEVICES = ("device", "is_cpu", "is_cuda", "is_mps")  # attributes
# what a process cannot have before the device has done all that it was given
WAITING = (
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "is_nonzero", "equal",
    "allclose", "nonzero", "argwhere", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount",
)  # fmt: skip
NUMBERS = ("tensor", "as_tensor", "new_tensor")  # take what lies in the computer's memory


def mapped(function: Callable[[Any], Any], thing: Any) -> Any:
    """The same of what a function makes of each leaf; torch's own such function takes most of the time here."""
    if isinstance(thing, dict):
        return {key: mapped(function, part) for key, part in thing.items()}
    if isinstance(thing, tuple | list) and not isinstance(thing, torch.Size):
        parts = [mapped(function, part) for part in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)
    return function(thing)


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU; only within Machine can anything be done with it."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: str) -> "OnGPU":
        if device == "mps" and inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework has none.")
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} outside of Machine")


class Machine(TorchFunctionMode):
    """A machine with a GPU: what is made there, moved there or computed there stays there till it is moved.

    Args:
        device: mps, which has no float64, or cuda:0.

    Attributes:
        waits: The functions called so far for which a process waits until the GPU has done all its work.

    Raises:
        TypeError: Where a tensor on mps would be float64.
        RuntimeError: Where a tensor there meets one of the CPU.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.waits = device, list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if func is torch.device or name == "_parse_to" or (name == "__get__" and func.__self__.__name__ in DEVICES):
            return func(*args, **kwargs)
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].device, args[1].dtype)
        leaves: list[Any] = []
        mapped(leaves.append, (args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
        if here and any(tensor.ndim for tensor in tensors if not isinstance(tensor, OnGPU)):
            if name == "_has_compatible_shallow_copy_type":  # asked by Module.to
                return False
            if name not in MIXING:
                kind = self.device.split(":")[0]
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {kind} and cpu.")
        devices = ["cpu"] if name == "cpu" else [str(leaf) for leaf in leaves if isinstance(leaf, str | torch.device)]
        there = any(map(self._is_here, devices)) or (bool(here) and "cpu" not in devices)
        if self._waits(name, args, kwargs, here, there):
            self.waits.append(name)
        bare_args, bare_kwargs = mapped(self._bare, (args, kwargs))
        found, first = func(*bare_args, **bare_kwargs), bare_args[0] if bare_args else None
        if not there:
            return found.clone() if here and found is first else found
        if here and found is first and name != "to":
            return args[0]  # changed in place
        return mapped(
            lambda t: OnGPU(t.clone() if t is first else t, self.device) if isinstance(t, torch.Tensor) else t, found
        )

    def _bare(self, leaf: Any) -> Any:
        return leaf.inner if isinstance(leaf, OnGPU) else "cpu" if self._is_here(leaf) else leaf

    def _is_here(self, leaf: Any) -> bool:
        return isinstance(leaf, str | torch.device) and str(leaf).split(":")[0] == self.device.split(":")[0]

    def _waits(self, name: str, args: Any, kwargs: Any, here: list[OnGPU], there: bool) -> bool:
        """Whether a process waits for the GPU at this call."""
        if name in ("to", "copy_"):
            from_here = [isinstance(one, OnGPU) for one in args[:2] if isinstance(one, torch.Tensor)]
            moves = (there != from_here[0]) if name == "to" else len(set(from_here)) == 2
            # what was not pinned waits on its way out even where it is asked not to
            return moves and (not kwargs.get("non_blocking") or from_here[-1])
        if name in NUMBERS:
            return there
        if name in ("__getitem__", "__setitem__") and here:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            one = name == "__setitem__" and (not isinstance(args[2], torch.Tensor) or not args[2].ndim)
            by_flags = any(isinstance(p, OnGPU) and p.dtype == torch.bool for p in places) and not one
            away = [p for p in places if isinstance(p, torch.Tensor) and p.ndim and not isinstance(p, OnGPU)]
            return by_flags or bool(away) or any(isinstance(p, list) for p in places)
        if name == "repeat_interleave":
            return bool(here) and any(isinstance(one, OnGPU) for one in args[1:])
        return name in WAITING and bool(here)


@contextmanager
def machine(device: str) -> Iterator[tuple[Machine, dict[str, Any]]]:
    """A machine with that GPU, and what pl.Trainer needs to run on it."""

    class Accelerator(CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            """Take the other device too."""

        @staticmethod
        def get_parallel_devices(devices: int) -> list[torch.device]:
            return [torch.device(device)] * devices

    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter becomes another object there
    generator = torch.Generator

    def generator_there(device: Any = "cpu") -> torch.Generator:
        return generator()

    low = candidates._sums_in_float32(torch.device("cpu")) and device != "mps"
    kind = torch.bfloat16 if low else torch.float32
    driver = {
        "mem_get_info": lambda device=None: (8 << 30, 16 << 30), "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0, "current_device": lambda: 0, "device": lambda device: nullcontext(),
    }  # fmt: skip
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(knn, "products_type", return_value=kind))
            if device != "mps":
                for name, stand_in in driver.items():
                    stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
                stack.enter_context(mock.patch.object(torch, "Generator", generator_there))
            yield (
                stack.enter_context(Machine(device)),
                {"accelerator": Accelerator(), "strategy": SingleDeviceStrategy(device=device)},
            )
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


class Refusing(DDPStrategy):
    """Processes that send by NCCL, each with that GPU: its tensors go by gloo, those of the CPU are refused.

    Gradients are averaged after each backward pass, since torch's reducer sees no tensors of tests/played.py.
    """

    def setup_distributed(self) -> None:
        """What Lightning does, but for the device that it names."""
        self.set_world_ranks()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", rank=self.global_rank, world_size=self.world_size)

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        for p in (p for p in self.lightning_module.parameters() if p.grad is not None):
            torch.distributed.all_reduce(p.grad)
            p.grad /= self.world_size


@contextmanager
def nccl() -> Iterator[dict[str, Any]]:
    """A machine with GPUs of which this process has one; gives what pl.Trainer needs to run on it."""

    def refusing(send: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if not all(isinstance(tensor, OnGPU) for tensor in tensors):
                raise RuntimeError("No backend type associated with device type cpu")
            mean = kwargs.get("op") == dist.ReduceOp.AVG  # which NCCL has and gloo has not
            kwargs |= {"op": dist.ReduceOp.SUM} if mean else {}
            bare_args, bare_kwargs = tree_map_only(OnGPU, lambda tensor: tensor.inner, (args, kwargs))
            send(*bare_args, **bare_kwargs)
            if mean:
                bare_args[0].div_(
                    dist.get_world_size(), rounding_mode=None if bare_args[0].is_floating_point() else "trunc"
                )

        return call

    def together(*args: Any, **kwargs: Any) -> None:
        gpu.waits.append("barrier")
        barrier()

    def nothing(module: Any) -> None:
        """Processes begin with the same weights."""

    dist = torch.distributed
    stand_ins = {name: refusing(getattr(dist, name)) for name in ("all_gather", "all_reduce", "broadcast", "reduce")}
    barrier = dist.barrier
    stand_ins |= {"get_backend": lambda group=None: "nccl", "barrier": together}
    with machine("cuda:0") as (gpu, where), ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(dist, name, stand_in))
        stack.enter_context(mock.patch.object(ddp, "_sync_module_states", nothing))
        yield {**where, "strategy": Refusing()}


@contextmanager
def apple() -> Iterator[dict[str, Any]]:
    """A machine with Apple's GPU; gives what pl.Trainer needs to run on it."""
    with machine("mps") as (_, where):
        yield where
