"""Images cut into tiles that may overlap, and feature maps of tiles blended into maps of whole images.

Along each side tiles lie on their own, so places and weights are those of one dimension. Places are multiples of the
deepest map's stride, so that a position of every map of a tile is a position of the whole image's map.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from panda_lightning.types import PandaError


def require_tiles(size: tuple[int, int], tile: int | None, overlap: int, stride: int) -> None:
    """Refuse tiles that cannot be cut or blended.

    Args:
        size: Height and width of the images in pixels.
        tile: Side of a tile in pixels; None is for images that are not cut.
        overlap: Pixels that neighbours share.
        stride: Pixels of a position of the deepest map.

    Raises:
        PandaError: Naming the nearest values that are allowed.
    """
    if tile is None:
        if overlap:
            raise PandaError(
                f"overlap={overlap} applies only to tiles, but images are not cut into tiles: set tile, or overlap=0."
            )
        return
    if tile > min(size):
        raise PandaError(f"tile={tile} is larger than images of {size[0]} x {size[1]} px: choose {min(size)} or less.")
    if overlap >= tile:
        raise PandaError(f"overlap={overlap} is not smaller than tile={tile}: choose 0 to {tile - 1}.")
    for name, value, most in (("tile", tile, min(size)), ("overlap", overlap, tile - 1)):
        if value % stride:
            below = value // stride * stride
            nearest = " or ".join(str(v) for v in (below, below + stride) if v <= most)
            raise PandaError(
                f"{name}={value} is not a multiple of {stride} px, the stride of the deepest level: choose {nearest}."
            )


def places(length: int, tile: int, overlap: int, stride: int) -> list[int]:
    """Where tiles begin along a side of an image, in pixels: at steps of ``tile - overlap``.

    The last one is moved back so that it ends at the image's border. Where the border is no multiple of ``stride``,
    it ends beyond, by less than that.

    Args:
        length: Of the side, at least ``tile``.
        tile: Side of a tile.
        overlap: What neighbours share.
        stride: Of the deepest map; tile and overlap are multiples.
    """
    last = -((tile - length) // stride) * stride
    return [*range(0, last, tile - overlap), last]


def cut(images: Tensor, rows: Sequence[int], columns: Sequence[int], tile: int) -> Tensor:
    """Tiles (B n, C, tile, tile) of images (B, C, H, W), row by row; beyond the border its pixels are repeated."""
    for dim, begins in ((2, rows), (3, columns)):
        inside = torch.arange(tile, device=images.device)
        taken = torch.cat([inside + begin for begin in begins]).clamp(max=images.shape[dim] - 1)
        images = images.index_select(dim, taken)
    grid = images.view(-1, images.shape[1], len(rows), tile, len(columns), tile)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, images.shape[1], tile, tile)


def blended(maps: Tensor, rows: Sequence[int], columns: Sequence[int], tile: int, size: tuple[int, int]) -> Tensor:
    """Maps of tiles as maps of whole images, each position the weighted mean of the tiles that hold it.

    Args:
        maps: (B n, C, h, h) of the tiles that ``cut`` gives, where h divides ``tile``.
        rows: Where tiles begin, from the top in pixels.
        columns: Where they begin, from the left.
        tile: Side of a tile in pixels.
        size: Height and width of the images in pixels.

    Returns:
        (B, C, H / stride, W / stride), rounded up, where stride is tile / h.
    """
    _, channels, side, _ = maps.shape
    stride = tile // side
    grid = maps.view(-1, len(rows), len(columns), channels, side, side).permute(0, 3, 1, 4, 2, 5)
    found = grid.reshape(-1, channels, len(rows) * side, len(columns) * side)
    for dim, begins, length in ((2, rows, size[0]), (3, columns, size[1])):
        found = _overlaid(found, dim, [begin // stride for begin in begins], side).narrow(dim, 0, -(-length // stride))
    return found


def _overlaid(maps: Tensor, dim: int, begins: Sequence[int], side: int) -> Tensor:
    """Parts of a side, one after the other along a dimension, summed with their weights where they belong."""
    whole = maps.new_zeros([*maps.shape[:dim], begins[-1] + side, *maps.shape[dim + 1 :]])
    each = weights(begins, side).to(maps, non_blocking=True)
    for part, begin, weight in zip(maps.chunk(len(begins), dim), begins, each, strict=True):
        whole.narrow(dim, begin, side).add_(part * weight.view(-1, *[1] * (3 - dim)))
    return whole


def weights(begins: Sequence[int], side: int) -> Tensor:
    """How much each tile counts at each of its positions along a side, (n, side): at every place they sum to 1.

    A weight falls off linearly over what a tile shares with its neighbour, never at the border of the image; where more
    than two tiles have a part, their weights are divided by the sum.

    Args:
        begins: Where tiles begin, in positions.
        side: Positions of a tile.
    """
    inside = torch.arange(side, dtype=torch.float64) + 0.5
    found = torch.ones(len(begins), side, dtype=torch.float64)
    for i, (one, other) in enumerate(pairwise(begins)):
        slope = inside / (one + side - other)  # steep without bound where tiles only touch
        found[i] = found[i].minimum(slope.flip(0))
        found[i + 1] = found[i + 1].minimum(slope)
    total = torch.zeros(begins[-1] + side, dtype=torch.float64)
    for begin, row in zip(begins, found, strict=True):
        total[begin : begin + side] += row
    return torch.stack([row / total[begin : begin + side] for begin, row in zip(begins, found, strict=True)])
