"""BatchNorm in eval mode is an affine map: it can be part of the convolution before it."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Layer = Callable[[Tensor], Tensor]


def fold_batchnorm(layers: Sequence[Layer], example: Tensor) -> list[Layer]:
    r"""Copy a chain of layers with each BatchNorm2d folded into the convolution whose output it takes.

    .. math:: \gamma \frac{W x - \mu}{\sqrt{v + \epsilon}} + \beta = W' x + b'

    Which convolution feeds which BatchNorm is seen by passing an image, not guessed from names.

    Args:
        layers: Modules in eval mode, and functions, which are kept as they are.
        example: Any input of the chain, (1, 3, H, W).

    Returns:
        A chain that gives the same values up to float32's rounding; the one given stays as it is.
    """
    modules = {i: copy.deepcopy(layer) for i, layer in enumerate(layers) if isinstance(layer, nn.Module)}
    copies = nn.ModuleList(modules.values())
    chain: list[Layer] = [modules.get(i, layer) for i, layer in enumerate(layers)]
    made: list[tuple[Tensor, str]] = []  # the outputs of convolutions, kept so that no two have the same identity
    pairs: list[tuple[str, str]] = []

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                made.append((output, name))
            else:
                pairs.extend((conv, name) for tensor, conv in made if tensor is inputs[0])

        return hook

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(see(name)) for name, m in copies.named_modules() if isinstance(m, kinds)]
    run(chain, example)
    for handle in hooks:
        handle.remove()
    for conv_name, norm_name in pairs:
        conv, norm = copies.get_submodule(conv_name), copies.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        folded = fuse_conv_bn_eval(conv, norm).to(memory_format=torch.channels_last)
        copies.set_submodule(conv_name, folded)
        copies.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))  # timm's BatchNormAct2d has one
    folded_modules = dict(zip(modules, copies, strict=True))  # a layer may itself be a convolution or a BatchNorm
    return [folded_modules.get(i, layer) for i, layer in enumerate(layers)]


def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """Pass one layer after the other."""
    for layer in layers:
        x = layer(x)
    return x
