"""Any timm network in two parts: the modules before the first adapted one, and the rest.

What a network's ``forward_features`` does between its modules (tokens, position embeddings, changes of layout, masks)
is written differently in each of timm's classes, and stays timm's own code here: the first part is that function, left
when the first adapted module is called; the second is the same function again, in which zeros stand in for the outputs
of the frozen modules, and the first adapted module takes what the first part kept. What depends on shapes alone comes
out right; a network whose images reach the adapted modules in more ways than one does not, and ``flow`` finds that out
by comparing numbers.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from panda_lightning.types import PandaError

Outputs = dict[str, list[Any]]  # of modules by name, one for each of their calls; a tensor as its shape and type


@dataclass(frozen=True)
class Flow:
    """How images pass a network.

    Attributes:
        used: The adapted parameters that features depend on.
        entry: The first module that is called of those with adapted parameters and no others; None if there is none.
        before: The modules called before it, without those within them, and without those it is in; all modules where
            there is no entry.
        after: The entry, and the modules called after it, likewise.
        feeds: Convolutions with the BatchNorm that alone takes their output.
        splits: Whether both parts together give the same features as the whole.
        side: Of the images that were passed, in pixels.
    """

    used: frozenset[str]
    entry: str | None
    before: tuple[str, ...]
    after: tuple[str, ...]
    feeds: tuple[tuple[str, str], ...]
    splits: bool
    side: int


def stride(model: nn.Module) -> int:
    """Pixels of the input for one of the last feature map, as timm has it; 1 where it does not say."""
    info = getattr(model, "feature_info", None)
    last: Any = info[-1] if info else {}
    return int(last.get("reduction", 1)) if isinstance(last, dict) else 1


def followed(model: nn.Module, adapted: Sequence[str], head: Callable[[Tensor], Tensor]) -> tuple[Flow, int]:
    """Pass images of noise, small ones if the network takes them, and see.

    Args:
        model: See flow.
        adapted: Names of the parameters that are to be adapted, no others than these will be.
        head: See flow.

    Returns:
        What was seen, and the dimensions of the features.

    Raises:
        PandaError: If the network gives no features (B, D) even of images of its own size.
    """
    timm_model: Any = model
    cfg, generator = timm_model.pretrained_cfg, torch.Generator().manual_seed(0)
    name, whole, small = cfg["architecture"], tuple(cfg["input_size"]), 2 * stride(model)
    for param_name, param in model.named_parameters():
        param.requires_grad_(param_name in adapted)
    for size in ((whole[0], small, small), whole) if small > 2 else (whole,):
        images = torch.randn((2, *size), generator=generator).to(next(model.parameters()))
        try:
            with torch.enable_grad(), torch.inference_mode(False):
                found, features = flow(model, adapted, head, images)
            break
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:  # a side that it does not take
            if size == whole:
                raise PandaError(
                    f"{name} cannot compute features of an image of its own input size, {whole[1]} x {whole[2]} "
                    f"({str(error).splitlines()[0]}): choose another network."
                ) from error
    if features.ndim != 2:
        raise PandaError(
            f"{name} gives features of shape {tuple(features.shape[1:])} per image, not one row: choose another "
            "network."
        )
    return found, features.shape[1]


def flow(
    model: nn.Module, adapted: Sequence[str], head: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[Flow, Tensor]:
    """Pass images and see.

    Args:
        model: A timm model in eval mode.
        adapted: Names of the parameters that are to be adapted; they require gradients.
        head: What ``forward_features`` gives -> features (B, D).
        images: (2, 3, H, W), normalised; of different content.

    Returns:
        What was seen, and the features.
    """
    timm_model: Any = model
    calls: list[str] = []
    feeds: list[tuple[str, str]] = []
    outputs: dict[int, tuple[str, Tensor]] = {}  # of convolutions; kept, so that no two have the same identity
    takers: dict[str, int] = defaultdict(int)

    def called(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append(name)
        for conv in {outputs[id(one)][0] for one in inputs if id(one) in outputs}:
            takers[conv] += 1
            if isinstance(module, nn.BatchNorm2d):
                feeds.append((conv, name))

    def left(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (name, output)

    modules = {name: module for name, module in model.named_modules() if name}
    with _hooked(modules, called, left):
        features = timm_model.forward_features(images)
    whole = head(features)
    wanted = [model.get_parameter(name) for name in adapted]
    gradients = torch.autograd.grad(whole.square().sum(), wanted, allow_unused=True) if wanted else ()
    used = frozenset(name for name, gradient in zip(adapted, gradients, strict=True) if gradient is not None)
    whole = whole.detach()

    def parts(name: str) -> Iterator[str]:
        return (f"{name}.{own}" for own, _ in modules[name].named_parameters())

    chosen = frozenset(adapted)  # what nothing depends on does no harm within the entry
    first = (i for i, name in enumerate(calls) if used.intersection(parts(name)) and chosen.issuperset(parts(name)))
    at = next(first, None)
    entry = None if at is None else calls[at]
    before = _outermost(calls[:at], entry)
    after = () if at is None else _outermost(calls[at:], None)
    once = {name for name in modules if calls.count(name) == 1}
    alone = tuple(pair for pair in feeds if once.issuperset(pair) and takers[pair[0]] == 1)
    found = Flow(used, entry, before, after, alone, False, images.shape[-1])
    if entry is None:
        return found, whole
    with torch.no_grad():
        try:
            hidden, outcome = first_part(model, found, images)
            again = head(second_part(model, found, hidden, images.shape, outcome))
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError):  # all that stand-ins raise
            return found, whole
        close = again.shape == whole.shape and bool((again - whole).abs().max() <= 1e-5 * whole.abs().max())
    return replace(found, splits=close), whole


class _ReachedError(Exception):
    """The first adapted module is called."""


def first_part(model: nn.Module, way: Flow, images: Tensor) -> tuple[Tensor, Outputs]:
    """Images (B, 3, H, W) up to the first adapted module: what it is given, and the forms of the outputs before it."""
    forms: Outputs = defaultdict(list)
    given: list[Tensor] = []

    def called(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if name == way.entry:
            (hidden,) = (one for one in inputs[:1] if isinstance(one, Tensor))
            given.append(hidden)
            if not torch.compiler.is_exporting():  # which would not see modules left so; it drops what is not used
                raise _ReachedError

    def left(name: str, module: nn.Module, output: Any) -> None:
        forms[name].append(tree_map(_Form.of, output))

    modules = {name: model.get_submodule(name) for name in (*way.before, str(way.entry))}
    with _hooked(modules, called, left):
        try:
            timm_model: Any = model
            timm_model.forward_features(images)
        except _ReachedError:
            pass
    return given[0], forms


def second_part(model: nn.Module, way: Flow, hidden: Tensor, shape: Sequence[int], forms: Outputs) -> Any:
    """What the first part kept (B, ...) through the rest of the network: what ``forward_features`` gives.

    Args:
        model: The network, or a copy of it.
        way: Its flow.
        hidden: See first_part; any number of images.
        shape: Of the images (b, 3, H, W) that first_part saw.
        forms: What it saw of them.
    """
    entered = False
    forms = {name: list(each) for name, each in forms.items()}

    def standing_in(name: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if entered:  # an activation, say, that both parts use
                return module(*args, **kwargs)
            form = forms[name].pop(0)
            return tree_map(lambda one: one.like(hidden, shape[0]) if isinstance(one, _Form) else one, form)

        return forward

    def entering(module: nn.Module) -> Callable[..., Any]:
        def forward(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal entered
            first, entered = not entered, True
            return module(hidden if first else _, *args, **kwargs)

        return forward

    changed = {name: standing_in(name, model.get_submodule(name)) for name in way.before}
    changed[str(way.entry)] = entering(model.get_submodule(str(way.entry)))
    timm_model: Any = replaced(model, {name: _computing(model.get_submodule(name), f) for name, f in changed.items()})
    nothing = hidden.new_zeros(()).expand(hidden.shape[0], *shape[1:])  # takes no memory
    return timm_model.forward_features(nothing)


@dataclass(frozen=True)
class _Form:
    """What a tensor was like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        """The form of a tensor, and anything else as it is."""
        return cls(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value

    def like(self, hidden: Tensor, before: int) -> Tensor:
        """Zeros of this form, for as many images as ``hidden`` has in place of ``before``; they take no memory."""
        rows = self.shape[0] * hidden.shape[0] // before  # not len(), which an export would fix
        return hidden.new_zeros((), dtype=self.dtype).expand(rows, *self.shape[1:])


def replaced(model: nn.Module, others: dict[str, nn.Module]) -> nn.Module:
    """A network with other modules at some places, that shares all else with the one given, which stays as it is."""
    root = _twin(model)
    twins: dict[str, nn.Module] = {"": root}
    for name, other in others.items():
        at, place = root, ""
        *path, last = name.split(".")
        for part in path:
            place = f"{place}.{part}".lstrip(".")
            if place not in twins:
                twins[place] = at._modules[part] = _twin(at.get_submodule(part))
            at = twins[place]
        at._modules[last] = other
    return root


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same parameters, buffers and children, whose children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _computing(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A module that computes something else, and has no hooks."""
    twin = _twin(module)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(twin, hooks, OrderedDict())
    twin._compiled_call_impl = None
    twin.forward = forward
    return twin


@contextmanager
def _hooked(
    modules: dict[str, nn.Module],
    called: Callable[[str, nn.Module, tuple[Any, ...]], None],
    left: Callable[[str, nn.Module, Any], None],
) -> Iterator[None]:
    """Tell of each call of modules, with its positional arguments or else the named ones, and of what comes of it."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: called(name, module, args or tuple(kwargs.values()))

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: left(name, module, output)

    hooks = [m.register_forward_pre_hook(before(name), with_kwargs=True) for name, m in modules.items()]
    hooks += [m.register_forward_hook(after(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _outermost(calls: Sequence[str], inner: str | None) -> tuple[str, ...]:
    """Modules that were called, each once, without those within another of them, and without those ``inner`` is in."""
    found: dict[str, None] = {}
    for name in calls:
        around = inner is not None and f"{inner}.".startswith(f"{name}.")
        if not around and not any(name == one or name.startswith(f"{one}.") for one in found):
            found[name] = None
    return tuple(found)
