"""Small networks that are trained from scratch: their BatchNorm learns, unlike that of a pretrained backbone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
    return [nn.BatchNorm2d(width, eps=1e-4, affine=False), nn.LeakyReLU(0.01)]


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
            nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
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
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(first)
        out: Tensor = short + self.conv2(self.dropout(torch.relu(self.norm2(self.conv1(first)))))
        return out
