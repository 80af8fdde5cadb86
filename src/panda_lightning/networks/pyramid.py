"""Feature maps of several resolutions from one pass of a pretrained network."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from panda_lightning.networks.backbones import Backbone, as_timm, portions
from panda_lightning.types import PandaError


@torch.no_grad()
def pyramid(backbone: Backbone, images: Tensor, levels: Sequence[int], pooled: bool = False) -> list[Tensor]:
    """Feature maps of several resolutions.

    Args:
        backbone: The network.
        images: (B, 3, H, W) uint8.
        levels: See ``level_pieces``.
        pooled: Go on to the end of the network, for its pooled features.

    Returns:
        A map (B, C, h, w) a level, in the order given; then, if asked for, the features (B, D).
    """
    wanted = level_pieces(backbone, levels)
    parts = [_pyramid(backbone, part, wanted, pooled) for part in portions(images, backbone.cached(images))]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _pyramid(backbone: Backbone, images: Tensor, wanted: list[str], pooled: bool) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    for name, x in backbone.walk(images):
        if name in wanted:
            found[name] = _as_map(backbone, x, images.shape[2:])
        if not pooled and len(found) == len(set(wanted)):
            break
    maps = [found[name] for name in wanted]
    return [*maps, as_timm(backbone.model).forward_head(x, pre_logits=True)] if pooled else maps


@torch.no_grad()
def positions(backbone: Backbone, images: Tensor) -> Tensor:
    """The last feature map (B, D, h, w) of images (B, 3, H, W) uint8, whose mean over positions the features are.

    Raises:
        PandaError: If the network pools otherwise.
    """
    *_, (_, last) = backbone.walk(images)
    found = _as_map(backbone, last, images.shape[2:]).float()
    pooled = as_timm(backbone.model).forward_head(last, pre_logits=True).float()
    mean = found.mean(dim=(2, 3))
    if mean.shape != pooled.shape or not torch.allclose(mean, pooled, rtol=0.02, atol=0.02 * float(pooled.abs().max())):
        raise PandaError(
            f"maps of pooled distances need features that are the mean of a feature map, which those of "
            f"{backbone.architecture} are not: leave maps out, or take a ResNet, EfficientNet, MobileNetV2 or RegNet."
        )
    return found


def resized(maps: Tensor, size: int) -> Tensor:
    """Maps (B, h, w) at the side of the images, (B, size, size), bilinearly."""
    return F.interpolate(maps.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def level_pieces(backbone: Backbone, levels: Sequence[int]) -> list[str]:
    """Layers behind which the pyramid's levels lie.

    Level 1 to 4 is the last map of 1/4, 1/8, 1/16 and 1/32 of the image's side: layer1 to layer4 of a ResNet. All
    maps of a ViT are of one size; its levels end the quarters of its blocks.

    Raises:
        PandaError: If the network has no such level.
    """
    info = as_timm(backbone.model).feature_info
    info = [(f["module"], f["reduction"]) for f in info if f["module"] in backbone.pieces]
    if len({reduction for _, reduction in info}) == 1:
        known = {level: info[math.ceil(level * len(info) / 4) - 1][0] for level in range(1, 5)}
    else:
        known = {level: name for level in range(1, 5) for name, reduction in info if reduction == 2 << level}
    if not levels or not set(levels) <= set(known):
        raise PandaError(
            f"levels={list(levels)} are not all levels of {backbone.architecture}: choose from "
            f"{', '.join(map(str, known))}."
        )
    return [known[level] for level in levels]


def _as_map(backbone: Backbone, x: Tensor, size: Sequence[int]) -> Tensor:
    """A ViT's tokens (B, N, C) as a map (B, C, h, w), without those that stand for no patch."""
    if x.ndim == 4:
        return x
    model = as_timm(backbone.model)
    grid = [side // patch for side, patch in zip(size, model.patch_embed.patch_size, strict=True)]
    patches = x[:, model.num_prefix_tokens :].transpose(1, 2)
    return patches.reshape(*patches.shape[:2], *grid)
