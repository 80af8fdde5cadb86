"""What of a timm network is adapted: its last stages, their norms, or a change of low rank beside their weights."""

import math
import re
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from panda_lightning.types import PandaError

Adapt = Literal["stages", "norm", "lora"]


def stages(model: nn.Module) -> list[list[str]]:
    """Names of parameters by stage, from the image on, and at the end those that come after all stages.

    A stage is a group of timm's ``group_matcher(coarse=True)`` that its pattern counts; what has no such function is
    divided by the modules of timm's ``feature_info``. What comes before the first stage is left out.
    """
    numbers, of_stages = _grouped(model)
    found = [[name for name, number in numbers.items() if number == stage] for stage in sorted(of_stages)]
    last = max(of_stages, default=-1)
    return [*found, [name for name, number in numbers.items() if number > last]]


def _grouped(model: Any) -> tuple[dict[str, int], set[int]]:
    """The number of each parameter's group, and which groups are stages."""
    from timm.models import group_parameters  # slow to import

    try:
        matcher = model.group_matcher(coarse=True)
        specs = {key: [(spec, None)] if isinstance(spec, str) else spec or () for key, spec in matcher.items()}
        numbers = group_parameters(model, matcher, reverse=True)
    except (AttributeError, AssertionError, TypeError):  # of the few that have no patterns
        return _grouped_by_maps(model)
    order = [(pattern, key != "stem" and place is None) for key, each in specs.items() for pattern, place in each]

    def counted(name: str) -> bool:
        return next((stage for pattern, stage in order if re.match(pattern, name)), False)

    return numbers, {number for name, number in numbers.items() if counted(name)}


def _grouped_by_maps(model: Any) -> tuple[dict[str, int], set[int]]:
    info = getattr(model, "feature_info", None) or ()
    modules = [entry["module"] for entry in info if isinstance(entry, dict)]
    numbers, now, seen = {}, -1, set()
    for name, _ in model.named_parameters():
        own = next((i for i, module in enumerate(modules) if name.startswith(f"{module}.")), None)
        if own is None and now == len(modules) - 1:
            numbers[name] = len(modules)
            continue
        now = own if own is not None else now
        seen |= {now} - {-1}
        numbers[name] = now
    return numbers, seen


def norms(model: nn.Module) -> set[str]:
    """Names of the scales and shifts of normalisation layers."""
    found = set()
    for place, module in model.named_modules():
        if "Norm" in type(module).__name__:
            found |= {f"{place}.{name}" for name, p in module.named_parameters(recurse=False) if p.ndim == 1}
    return found


class LowRank(nn.Module):
    """Weights (O, I), or (O, I, 1, 1), plus a product of two small matrices, (O, R) and (R, I), 0 before training.

    (Hu et al., LoRA, ICLR 2022, without its factor alpha / R.) It starts from the same numbers whatever the run's seed.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        generator, bound = torch.Generator().manual_seed(0), 1 / math.sqrt(weight.shape[1])
        down = (2 * torch.rand(rank, weight.shape[1], generator=generator) - 1) * bound
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weights."""
        return weight + (self.up @ self.down).view_as(weight)


def train_only(model: nn.Module, names: Collection[str], adapt: Adapt, rank: int) -> None:
    """Let these parameters be trained, or their norms, or changes of low rank beside their linear layers' weights.

    Raises:
        PandaError: If the rank is larger than a layer, or there are no such layers to speak of.
    """
    trained = set(names) & norms(model) if adapt == "norm" else set(names)
    for name, param in model.named_parameters():
        param.requires_grad_(name in trained and adapt != "lora")
    if adapt != "lora" or not trained:
        return
    layers = {place: module for place, module in model.named_modules() if f"{place}.weight" in trained}
    linear = {place: module for place, module in layers.items() if _is_linear(module)}
    share = sum(m.weight.numel() for m in linear.values()) / sum(model.get_parameter(n).numel() for n in trained)
    if share < 0.5:
        raise PandaError(
            f"adapt=lora changes only linear layers and 1 x 1 convolutions, which have {100 * share:.0f} % of "
            f"the adapted parameters of this {type(model).__name__}: choose adapt=stages or norm."
        )
    for place, module in linear.items():
        if rank > min(module.weight.shape[:2]):
            raise PandaError(
                f"lora_rank={rank} is higher than the full rank of {place}, a layer of "
                f"{tuple(module.weight.shape)}: choose less."
            )
        register_parametrization(module, "weight", LowRank(module.weight, rank))


def _is_linear(module: nn.Module) -> bool:
    one = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or one


def plain(name: str) -> str:
    """Timm's name of weights, whether they are a parameter or the sum of several."""
    return re.sub(r"\.parametrizations\.(\w+)\.(original|\d+\.\w+)$", r".\1", name)


def is_low_rank(name: str) -> bool:
    """Whether a parameter is part of a change of low rank."""
    return re.search(r"\.parametrizations\.\w+\.\d+\.(up|down)$", name) is not None


def summed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state by plain timm names, whatever of it was trained as a change of low rank."""
    found = {plain(name): value for name, value in state.items() if not is_low_rank(name)}
    for name, up in state.items():
        if is_low_rank(name) and name.endswith(".up"):  # where changes are left out, weights are as they were
            change = up @ state[f"{name.removesuffix('up')}down"]
            found[plain(name)] = found[plain(name)] + change.view_as(found[plain(name)])
    return found
