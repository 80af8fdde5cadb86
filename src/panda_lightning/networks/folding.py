"""Networks computed otherwise: BatchNorm as part of the convolution before it, and modules compiled."""

import copy
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from panda_lightning.networks.splitting import Flow, replaced

Optimize = Literal["plain", "channels_last", "folded", "compiled"]


class Computed:
    """A network as it is computed: itself, or a copy that shares its weights, but for those that are folded.

    Args:
        model: The network, in eval mode.
        flow: How images pass through it.
        optimize: See Backbone.
    """

    def __init__(self, model: nn.Module, flow: Flow, optimize: Optimize) -> None:
        self._model, self._flow, self._optimize = model, flow, optimize
        self._copy: tuple[object, nn.Module] | None = None

    def now(self) -> nn.Module:
        """The network for the weights of this moment: the copy is made anew where any were loaded or moved since."""
        flow, compile_all = self._flow, self._optimize == "compiled"
        if not compile_all and not (self._optimize == "folded" and flow.feeds):
            return self._model
        frozen = (self._model.get_submodule(name) for name in flow.before)
        tensors = [t for module in frozen for t in (*module.parameters(), *module.buffers())]
        state = [(t.data_ptr(), t._version) for t in tensors]  # each tensor's place and number of changes
        if self._copy is None or self._copy[0] != state:
            device = tensors[0].device.type if tensors else "cpu"
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                made = fold_batchnorm(self._model, flow.before, flow.feeds)
            self._copy = (state, compiled(made, (*flow.before, *flow.after)) if compile_all else made)
        return self._copy[1]

    def rest(self) -> nn.Module:
        """The network for what comes after the frozen layers: the given one, unless all is compiled."""
        return self.now() if self._optimize == "compiled" else self._model


def fold_batchnorm(model: nn.Module, units: Sequence[str], feeds: Sequence[tuple[str, str]]) -> nn.Module:
    r"""Copy a network with BatchNorm2d, in eval mode an affine map, as part of the convolution whose output it takes.

    .. math:: \gamma \frac{W x - \mu}{\sqrt{v + \epsilon}} + \beta = W' x + b'

    Args:
        model: In eval mode.
        units: The modules in which to fold.
        feeds: Convolutions and what takes their output, see splitting.Flow.

    Returns:
        A network that gives the same values up to float32's rounding, and shares with the one given all that is not
        folded; the one given stays as it is.
    """
    from timm.layers.conv2d_same import Conv2dSame  # slow to import

    pairs = [(conv, norm) for conv, norm in feeds if _within(conv, units) and _within(norm, units)]
    pairs = [(conv, norm) for conv, norm in pairs if type(model.get_submodule(conv)) in (nn.Conv2d, Conv2dSame)]
    touched = [unit for unit in units if any(_within(name, (unit,)) for pair in pairs for name in pair)]
    found = replaced(model, {unit: copy.deepcopy(model.get_submodule(unit)) for unit in touched})
    for conv_name, norm_name in pairs:
        conv, norm = found.get_submodule(conv_name), found.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        folded = fuse_conv_bn_eval(conv, norm).to(memory_format=torch.channels_last)
        found.set_submodule(conv_name, folded)
        found.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))  # timm's BatchNormAct2d has one
    return found


def compiled(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A network with these modules compiled, which shares all with the one given."""
    others = {name: copy.copy(model.get_submodule(name)) for name in names}
    for module in others.values():
        module.compile()
    return replaced(model, others)


def _within(name: str, units: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{unit}.") for unit in units)
