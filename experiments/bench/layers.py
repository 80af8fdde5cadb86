"""Gain and difference of each level of `optimize`: images per second of the frozen and of the adapted part.

    python experiments/bench/layers.py resnet18 224 64 mobilenetv2_100 160 128 resnet152 224 16

Arguments: timm name, pixels, images, as often as wanted. Random weights, which cost the same as trained ones; medians
of five alternating rounds; the difference is that of the pooled features, relative, to `plain`.
"""

import sys
from statistics import median

import timm
import torch
from clock import DEVICE, clock
from torch import nn

from panda_lightning import Backbone

LEVELS = ("plain", "channels_last", "folded", "compiled")


def build(name, level):
    """The network with statistics unlike a fresh BatchNorm's, the same for each level."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return Backbone(model, 2, optimize=level).to(DEVICE)


def adapted_only(backbone, hidden, train):
    """One pass of the adapted layers over all images, 32 at a time."""
    with torch.set_grad_enabled(train):
        for part in hidden.split(32):
            features = backbone.suffix(part)
            if train:
                features.square().mean().backward()


def main(name, pixels, count):
    """Print the rows of one network."""
    images = torch.randint(0, 256, (count, 3, pixels, pixels), dtype=torch.uint8, device=DEVICE)
    networks = {level: build(name, level) for level in LEVELS}
    hidden = {level: network.prefix(images) for level, network in networks.items()}
    first, rates = {}, {level: ([], [], []) for level in LEVELS}
    for level, network in networks.items():
        first[level] = clock(lambda n=network: (n.prefix(images), adapted_only(n, hidden["plain"], True)))
        adapted_only(network, hidden["plain"], False)
    for _ in range(5):
        for level, network in networks.items():
            works = (
                lambda n=network: n.prefix(images),
                lambda n=network: adapted_only(n, hidden["plain"], False),
                lambda n=network: adapted_only(n, hidden["plain"], True),
            )
            for found, work in zip(rates[level], works, strict=True):
                found.append(count / clock(work))
    with torch.no_grad():
        features = {level: network(images) for level, network in networks.items()}
    for level in LEVELS:
        difference = (features[level] - features["plain"]).norm() / features["plain"].norm()
        values = " | ".join(f"{median(found):,.0f}" for found in rates[level])
        gain = median(a / b for a, b in zip(rates[level][0], rates["plain"][0], strict=True))
        print(f"| {name}, {pixels} px, {level} | {values} | {gain:.2f} | {difference:.0e} |", flush=True)


if __name__ == "__main__":
    print("| | frozen, images/s | adapted | adapted with gradient | frozen, gain | difference |")
    print("|---|---|---|---|---|---|")
    for at in range(1, len(sys.argv), 3):
        main(sys.argv[at], int(sys.argv[at + 1]), int(sys.argv[at + 2]))
