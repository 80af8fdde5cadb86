"""Feature maps of several resolutions from one pass of a pretrained network."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from panda_lightning.networks.backbones import Backbone, as_timm, portions
from panda_lightning.types import PandaError


@torch.no_grad()
def pyramid(
    backbone: Backbone, images: Tensor, levels: Sequence[int], pooled: bool = False, at_once: int | None = None
) -> list[Tensor]:
    """Feature maps of several resolutions.

    Args:
        backbone: The network.
        images: (B, 3, H, W) uint8.
        levels: See ``level_maps``.
        pooled: Go on to the end of the network, for its pooled features.
        at_once: Images that pass the network together; None leaves it to the backbone.

    Returns:
        A map (B, C, h, w) a level, in the order given; then, if asked for, the features (B, D).
    """
    wanted = level_maps(backbone, levels)
    parts = [_pyramid(backbone, part, wanted, pooled) for part in portions(images, at_once or backbone.cached(images))]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _pyramid(backbone: Backbone, images: Tensor, wanted: list[int], pooled: bool) -> list[Tensor]:
    taken = sorted(set(wanted))
    model, x = as_timm(backbone.computing), backbone.normalized(images)
    if not pooled:
        maps = model.forward_intermediates(x, indices=taken, stop_early=True, intermediates_only=True)
        return [maps[taken.index(i)] for i in wanted]
    last, maps = model.forward_intermediates(x, indices=taken)
    return [*(maps[taken.index(i)] for i in wanted), backbone.pooled(last)]


@torch.no_grad()
def positions(backbone: Backbone, images: Tensor) -> Tensor:
    """The last feature map (B, D, h, w) of images (B, 3, H, W) uint8, whose mean over positions the features are.

    Raises:
        PandaError: If the network pools otherwise.
    """
    last: Tensor = as_timm(backbone.computing).forward_features(backbone.normalized(images))
    found, pooled = _as_map(backbone, last, images.shape[2:]).float(), backbone.pooled(last).float()
    mean = found.mean(dim=(2, 3))
    if mean.shape != pooled.shape or not torch.allclose(mean, pooled, rtol=0.02, atol=0.02 * float(pooled.abs().max())):
        raise PandaError(
            "maps of pooled distances need features that are the mean of a feature map, but those of "
            f"{backbone.architecture} are not: leave maps out, or use a ResNet, EfficientNet, MobileNetV2 or "
            "RegNet."
        )
    return found


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) at the size of the images (B, H, W), bilinearly."""
    return F.interpolate(maps.unsqueeze(1), size=list(size), mode="bilinear", align_corners=False)[:, 0]


def level_maps(backbone: Backbone, levels: Sequence[int]) -> list[int]:
    """Which of timm's intermediate maps the pyramid's levels are.

    Level 1 to 4 is the last map of 1/4, 1/8, 1/16 and 1/32 of the image's side: layer1 to layer4 of a ResNet. All
    maps of a ViT are of one size; its levels end the quarters of its blocks.

    Raises:
        PandaError: If the network has no such level.
    """
    model = as_timm(backbone.model)
    reductions = _reductions(model) if hasattr(model, "forward_intermediates") else []
    if len(reductions) >= 4 and len(set(reductions)) == 1:
        known = {level: math.ceil(level * len(reductions) / 4) - 1 for level in range(1, 5)}
    else:
        known = {level: i for level in range(1, 5) for i, reduction in enumerate(reductions) if reduction == 2 << level}
    if not known:
        raise PandaError(
            f"{backbone.architecture} gives no feature maps of several resolutions: choose another network, such as "
            "wide_resnet50_2.tv_in1k."
        )
    if not levels or not set(levels) <= set(known):
        raise PandaError(
            f"levels={list(levels)} are not all levels of {backbone.architecture}: choose from "
            f"{', '.join(map(str, known))}."
        )
    return [known[level] for level in levels]


def level_strides(backbone: Backbone, levels: Sequence[int]) -> list[int]:
    """Pixels of the images for one position of the map of each level.

    Raises:
        PandaError: If the network has no such level.
    """
    reductions = _reductions(as_timm(backbone.model))
    return [reductions[i] for i in level_maps(backbone, levels)]


def _reductions(model: Any) -> list[int]:
    """Pixels of the images for one position of each of timm's intermediate maps."""
    return [entry["reduction"] for entry in getattr(model, "feature_info", ())]


def _as_map(backbone: Backbone, x: Tensor, size: Sequence[int]) -> Tensor:
    """What ``forward_features`` gives as a map (B, C, h, w): (B, h, w, C) turned, of tokens (B, N, C) the patches'."""
    if x.ndim == 4:
        last = x.shape[1] != backbone.num_features and x.shape[3] == backbone.num_features
        return x.permute(0, 3, 1, 2) if last else x
    patches = x[:, int(getattr(backbone.model, "num_prefix_tokens", None) or 0) :]
    height = round(math.sqrt(patches.shape[1] * size[0] / size[1]))
    return patches.transpose(1, 2).reshape(*patches.shape[::2], height, -1)
