"""How Pillow resizes pictures of 8 bits, in tensors, bit for bit: for files that must do it without Pillow."""

import PIL
import torch
from torch import Tensor

from panda_lightning.pictures.view import BEFORE, THIN, View

ONE = float(1 << 22)  # what Pillow's weights, whole numbers, add up to
HEIGHT_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # whether it begins with the height of tall pictures


def fitted(images: Tensor, view: View) -> Tensor:
    """What a view makes of upright pictures of one size, (B, 3, H, W) uint8 -> (B, 3, *view.sides) uint8."""
    how, kept = view.interpolation, view.usual
    if view.before is not None:
        side, corner, inner = BEFORE[view.before]
        images = _resized(images, how, (_number(side),) * 2, (_number(corner),) * 2, (inner, inner))
    size = [_length(images, dim) for dim in (2, 3)]
    if view.crop == "squash":
        return _resized(images, how, (_number(kept[0]), _number(kept[1])), (_number(0),) * 2, kept)
    covers = [size[0] * kept[1], size[1] * kept[0]]
    least, most = torch.minimum(*covers), torch.maximum(*covers)
    spare = [((n - (4 * least / side).floor()) / 2).floor() for n, side in zip(size, kept[::-1], strict=True)]
    cut = [torch.where(most > THIN * least, n.clamp(min=0), 0) for n in spare]
    rest = [n - 2 * margin for n, margin in zip(size, cut, strict=True)]
    scale = torch.maximum(*(view.resize * side / (min(kept) * n) for n, side in zip(rest, kept, strict=True)))
    edges = [round(view.resize * side / min(kept)) for side in kept]
    target = [(n * scale).round().clamp(min=edge) for n, edge in zip(rest, edges, strict=True)]
    first = [((n - side) / 2).round() for n, side in zip(target, kept, strict=True)]
    return _resized(images, how, (target[0], target[1]), (first[0], first[1]), kept, (cut[0], cut[1]))


def _resized(
    images: Tensor,
    how: str,
    target: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    kept: tuple[int, int],
    cut: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Resize pictures to ``target`` (height, width), and keep a part from ``first`` on.

    Args:
        images: (B, 3, H, W) uint8.
        how: bilinear or bicubic.
        target: Whole numbers, as tensors: what follows from a picture's size is not known when a graph is made.
        first: Likewise.
        kept: Rows and columns of that part.
        cut: Rows above and below, and columns left and right, that are taken away beforehand.

    Returns:
        (B, 3, *kept) uint8.
    """
    cut = cut or (_number(0),) * 2
    down, across = (
        _weights(images.shape[dim], _length(images, dim), margin, n, start, count, how, dim)
        for dim, margin, n, start, count in zip((2, 3), cut, target, first, kept, strict=True)
    )
    x = images.double()
    found = _rounded(down @ _rounded(x @ across))
    if HEIGHT_FIRST:
        shrunk, narrowed = (
            _length(images, dim) - 2 * margin - n for dim, margin, n in zip((2, 3), cut, target, strict=True)
        )
        other = _rounded(_rounded(down @ x) @ across)
        found = torch.where(shrunk > 2 * narrowed.clamp(min=0), other, found)
    return found.to(torch.uint8)


def _weights(
    size: int, length: Tensor, cut: Tensor, target: Tensor, first: Tensor, count: int, how: str, dim: int
) -> Tensor:
    """Pillow's weights of the pixels of one side for ``count`` pixels of what comes out, whole numbers.

    They are those of a triangle or of Keys' cubic (a = -.5), as wide as the step from one pixel to the next. Products
    with pixels are exact in float64.

    Returns:
        (count, size) to multiply from the left, for the height (``dim`` 2), or (size, count) from the right.
    """
    old, new = (1, 0) if dim == 2 else (0, 1)
    place = (torch.arange(size, dtype=torch.float64, device=length.device) - cut).unsqueeze(new)
    length = length - 2 * cut
    step = length / target
    width = step.clamp(min=1)
    reach = width * (1 if how == "bilinear" else 2)
    centre = ((first + torch.arange(count, dtype=torch.float64, device=length.device) + 0.5) * step).unsqueeze(old)
    low = (centre - reach + 0.5).trunc().clamp(min=0)
    high = torch.minimum((centre + reach + 0.5).trunc(), length)
    x = ((place - centre + 0.5) / width).abs()
    if how == "bilinear":
        curve = (1 - x).clamp(min=0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        curve = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    curve = torch.where((place >= low) & (place < high), curve, 0.0)
    scaled: Tensor = curve / curve.sum(dim=old, keepdim=True) * ONE
    return (scaled.abs() + 0.5).floor() * scaled.sign()


def _rounded(sums: Tensor) -> Tensor:
    """Weighted sums of pixels as 8 bits."""
    return (sums / ONE + 0.5).floor().clamp(0, 255)


def _number(value: int) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _length(images: Tensor, dim: int) -> Tensor:
    """A side as a tensor, which follows the pictures when a graph is run."""
    places = torch.arange(images.shape[dim], dtype=torch.float64, device=images.device)
    return places[-1] + 1
