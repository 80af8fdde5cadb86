"""Small networks that are trained from scratch: their BatchNorm learns, unlike that of a pretrained backbone.

Normalisation and dropout see the batch of all processes together: any number of them trains the same network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from typing_extensions import override

from panda_lightning.runtime.processes import world_size
from panda_lightning.types import PandaError


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics, while it trains, are those of the images of all processes.

    torch's SyncBatchNorm does the same on GPUs alone. A process may have no images in a step. Sums are float64: one
    process and many differ by float32's rounding.
    """

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of half precision overflow from 256 on
        sums = torch.stack([t.sum(dim=(0, 2, 3), dtype=torch.float64) for t in (torch.ones_like(x), x, wide.square())])
        count, total, squares = all_reduce(sums)  # type: ignore[no-untyped-call]
        mean, var = total / count, squares / count - (total / count).square()
        with torch.no_grad():
            step = self.momentum or 0.1
            self.running_mean.lerp_(mean.to(self.running_mean), step)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var), step)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = self.weight * scale, self.weight * shift + self.bias
        out: Tensor = x * scale.to(x)[:, None, None] + shift.to(x)[:, None, None]
        return out


class Dropout(nn.Dropout):
    """Dropout that draws for the batch of all processes on each of them, which then takes the rows of its own images.

    Attributes:
        share: Images of a step over all processes, which are dealt out like cards, and this process's number; None is
            for the images at hand alone.
        generator: Of the draws, for all layers of a network; None is torch's own.
    """

    share: tuple[int, int] | None = None
    generator: torch.Generator | None = None

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share is None:
            return super().forward(x)
        batch, rank = self.share
        drawn = torch.rand((batch, *x.shape[1:]), generator=self.generator, device=x.device)
        kept = drawn[rank :: world_size()][: len(x)] >= self.p
        out: Tensor = x * kept / (1 - self.p)
        return out


# channels, widths of the convolutions, outputs of the linear layers (Ruff et al. 2018, section 4)
LENETS = {
    "mnist": (1, (8, 4), (32,)),
    "fashion_mnist": (1, (16, 32), (128, 64)),
    "cifar10": (3, (32, 64, 128), (128,)),
    "64px": (3, (32, 64, 128, 256), (128,)),  # not in the paper: one more block
}


def deep_svdd_networks(name: str, size: int) -> tuple[int, nn.Sequential, nn.Sequential]:
    """Channels, encoder and decoder of Deep SVDD for images of ``size`` pixels, by name or, with auto, by size.

    Raises:
        PandaError: If the size does not suit the network.
    """
    by_size = {28: "fashion_mnist", 32: "cifar10", 64: "64px"}
    found = by_size.get(size, "") if name == "auto" else name
    if not found or size % (1 << len(LENETS[found][1])):
        raise PandaError(
            f"image_size={size} does not suit network={name}: choose 28 (mnist, fashion_mnist), 32 (cifar10) or 64 "
            "(64px)."
        )
    channels, widths, dims = LENETS[found]
    return channels, lenet(channels, size, widths, dims), lenet_decoder(channels, size, widths, dims)


def lenet(channels: int, size: int, widths: Sequence[int], dims: Sequence[int]) -> nn.Sequential:
    """The encoder of Deep SVDD (Ruff et al. 2018): no bias anywhere, or the centre could be met by it alone.

    Args:
        channels: Of the images.
        size: Side of the images, a multiple of 2 to the power of ``len(widths)``.
        widths: Channels of each 5 x 5 convolution, which halves the side.
        dims: Outputs of each linear layer; the last is the representation's size.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 5, padding=2, bias=False), *_norm(width), nn.MaxPool2d(2)]
        channels = width
    layers.append(nn.Flatten())
    inputs = channels * (size >> len(widths)) ** 2
    for i, outputs in enumerate(dims):
        layers += [*([nn.LeakyReLU(0.01)] if i else []), nn.Linear(inputs, outputs, bias=False)]
        inputs = outputs
    return nn.Sequential(*layers)


def lenet_decoder(channels: int, size: int, widths: Sequence[int], dims: Sequence[int]) -> nn.Sequential:
    """The mirror image of ``lenet``, for its pretraining as an autoencoder; images come out in [0, 1]."""
    side, width = size >> len(widths), widths[-1]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(reversed(dims), (*reversed(dims[:-1]), width * side**2), strict=True):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.LeakyReLU(0.01)]
    layers.append(nn.Unflatten(1, (width, side, side)))
    for outputs in (*reversed(widths[:-1]), channels):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, outputs, 5, padding=2, bias=False), *_norm(outputs)]
        width = outputs
    layers[-2:] = [nn.Sigmoid()]  # in place of the last normalisation
    return nn.Sequential(*layers)


def _norm(width: int) -> list[nn.Module]:
    return [BatchNorm2d(width, eps=1e-4, affine=False), nn.LeakyReLU(0.01)]


class WideResNet(nn.Module):
    """A wide residual network for images of about 32 pixels (Zagoruyko and Komodakis 2016), up to its pooled features.

    Args:
        depth: Layers, 6 n + 4 for n blocks in each of the three groups.
        width: Factor on the channels 16, 32, 64.
        dropout: Between the two convolutions of a block.
    """

    def __init__(self, depth: int = 16, width: int = 4, dropout: float = 0.3) -> None:
        super().__init__()
        self.num_features = 64 * width
        blocks: list[nn.Module] = []
        inputs = 16
        for group, stride in enumerate((1, 2, 2)):
            for block in range((depth - 4) // 6):
                outputs = 16 * width << group
                blocks.append(_WideBlock(inputs, outputs, 1 if block else stride, dropout))
                inputs = outputs
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, BatchNorm2d(inputs), nn.ReLU(inplace=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised, -> features (B, num_features)."""
        features: Tensor = self.layers(images).mean(dim=(2, 3))
        return features


class _WideBlock(nn.Module):
    """BN, ReLU, convolution, twice; the shortcut leaves after the first ReLU where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = BatchNorm2d(inputs), BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = Dropout(dropout)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(first)
        out: Tensor = short + self.conv2(self.dropout(torch.relu(self.norm2(self.conv1(first)))))
        return out
