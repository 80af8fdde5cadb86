"""What is done to the pixels of a whole batch at once, on the device where it lies.

Randomness comes in as uniform numbers (B, n), one row an image, so that each function can be checked and repeated.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from panda_lightning.runtime.float32 import full_float32

VIEW_DRAWS = 13  # random numbers for one view of an image
CROP_DRAWS = 3  # and for one crop


def contrast_normalize(images: Tensor) -> Tensor:
    """Global contrast normalisation by the L1 norm: subtract each image's mean, divide by its mean absolute value.

    Args:
        images: (B, C, H, W).

    Returns:
        The same shape, float32.
    """
    x = images.float()
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return x / x.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-8)


def turn_and_shift(images: Tensor, quarters: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Turn each image, then shift it; what comes in at the edges is its reflection.

    Args:
        images: (B, C, S, S), square.
        quarters: (B,), quarter turns counter-clockwise.
        right: (B,), pixels to the right, negative to the left.
        down: (B,), pixels downwards, negative upwards.

    Returns:
        Images of the same shape and type.
    """
    number = torch.arange(images.shape[0], device=images.device)
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])[quarters % 4, number]
    pixel = torch.arange(images.shape[-1], device=images.device)
    return _picked(turned, _reflected(pixel - down[:, None]), _reflected(pixel - right[:, None]))


def crop_and_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """A random place in the reflection-padded image, mirrored half of the time.

    Args:
        images: (B, C, S, S).
        draws: (B, CROP_DRAWS) uniform in [0, 1).
        padding: Pixels on each side.
    """
    shift = (draws[:, :2] * (2 * padding + 1)).long() - padding
    pixel = torch.arange(images.shape[-1], device=images.device)
    columns = torch.where(draws[:, 2:] < 0.5, pixel.flip(0), pixel)
    return _picked(images, _reflected(pixel + shift[:, :1]), _reflected(columns + shift[:, 1:]))


def _reflected(places: Tensor) -> Tensor:
    """Places (B, S) outside 0..S-1 brought back as in a mirror that does not repeat the edge."""
    last = places.shape[1] - 1
    return last - (last - places.abs()).abs()


def _picked(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    number = torch.arange(images.shape[0], device=images.device)
    return images.permute(0, 2, 3, 1)[number[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_view(images: Tensor, draws: Tensor) -> Tensor:
    """A view for contrastive learning, as MSC takes it (arXiv 2106.03844, after SimCLR).

    A crop of 0.2 to 1 of the area and 3/4 to 4/3 of the image's own shape, resized back and mirrored half of the time;
    brightness, contrast and saturation by up to 0.4 and hue by up to 0.1, in this order, in 80 % of images; grey in
    20 %; blurred with a sigma of 0.1 to 2 pixels in 50 %.

    Args:
        images: (B, 3, H, W) uint8.
        draws: (B, VIEW_DRAWS) uniform in [0, 1).

    Returns:
        (B, 3, H, W) uint8.
    """
    u = draws.unbind(dim=1)
    with full_float32(images.device):  # half precision moves a crop by a pixel, and TF32 changes a blurred one
        return _view(images, u)


def _view(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    x = resized_crop(images / 255, 0.2 + 0.8 * u[0], (4 / 3) ** (2 * u[1] - 1), torch.stack(u[2:4], dim=1), u[4] < 0.5)
    brightness, contrast, saturation = (0.6 + 0.8 * part for part in u[5:8])
    jittered = shift_hue(saturate(change_contrast(brighten(x, brightness), contrast), saturation), 0.2 * u[8] - 0.1)
    x = torch.where((u[9] < 0.8).view(-1, 1, 1, 1), jittered, x)
    x = torch.where((u[10] < 0.2).view(-1, 1, 1, 1), grey(x), x)
    x = blur(x, torch.where(u[11] < 0.5, 0.1 + 1.9 * u[12], 1e-3))
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def resized_crop(images: Tensor, area: Tensor, ratio: Tensor, place: Tensor, mirrored: Tensor) -> Tensor:
    """Cut a rectangle out of each image and resize it, bilinearly, to the image's size.

    Args:
        images: (B, C, H, W) floating point.
        area: (B,), fraction of the image.
        ratio: (B,), width to height, as shares of the image's; sides longer than the image's are cut to it.
        place: (B, 2), where in the room that is left, horizontally and vertically, from 0 to 1.
        mirrored: (B,) bool.
    """
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
    centre = (1 - sides) * (2 * place - 1)
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0] = torch.where(mirrored, -sides[:, 0], sides[:, 0])
    theta[:, 1, 1] = sides[:, 1]
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def grey(images: Tensor) -> Tensor:
    """Luma by ITU-R 601, in all three channels: (B, 3, H, W)."""
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1).expand_as(images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def brighten(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply images (B, 3, H, W) in [0, 1] by factors (B,)."""
    return _blend(images, torch.zeros_like(images), factor)


def change_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move images (B, 3, H, W) in [0, 1] away from their mean grey by factors (B,)."""
    return _blend(images, grey(images).mean(dim=(1, 2, 3), keepdim=True).expand_as(images), factor)


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Move images (B, 3, H, W) in [0, 1] away from their grey version by factors (B,)."""
    return _blend(images, grey(images), factor)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images (B, 3, H, W) in [0, 1] by fractions of the circle (B,), saturation and value kept."""
    value, largest = images.max(dim=1)
    chroma = value - images.min(dim=1).values
    red, green, blue = images.unbind(dim=1)
    difference = torch.stack([green - blue, blue - red, red - green], dim=1)
    sixth = difference.gather(1, largest.unsqueeze(1)).squeeze(1) / chroma.clamp(min=1e-12) + 2 * largest
    sixth = sixth + 6 * turns.view(-1, 1, 1)
    k = (torch.arange(5, 0, -2, device=images.device).view(3, 1, 1) + sixth.unsqueeze(1)) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images (B, C, H, W) by sigmas (B,) in pixels, at most 2, over 13 pixels, edges reflected."""
    count, channels, height, width = images.shape
    radius = min(6, height - 1, width - 1)
    offset = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-0.5 * (offset / sigma.view(-1, 1)).square(), dim=1).repeat_interleave(channels, dim=0)
    x = F.pad(images, (radius,) * 4, mode="reflect").view(1, count * channels, height + 2 * radius, -1)
    for shape in ((-1, 1, 2 * radius + 1, 1), (-1, 1, 1, 2 * radius + 1)):
        x = F.conv2d(x, kernel.view(shape), groups=count * channels)
    return x.view(count, channels, height, width)
