import pytest
import torch

from panda_lightning import PandaError
from panda_lightning.networks.tiles import blended, cut, places, require_tiles, weights

LAID = [  # side, tile, overlap, stride; where tiles begin
    ((64, 64, 0, 16), [0]),
    ((192, 64, 0, 16), [0, 64, 128]),
    ((192, 64, 16, 16), [0, 48, 96, 128]),
    ((160, 64, 48, 16), [0, 16, 32, 48, 64, 80, 96]),
    ((176, 64, 0, 16), [0, 64, 112]),  # the last one moved back
    ((65, 64, 0, 16), [0, 16]),  # and beyond the border by less than a stride
    ((100, 32, 8, 4), [0, 24, 48, 68]),
]


@pytest.mark.parametrize(("how", "begins"), LAID)
def test_tiles_reach_from_border_to_border(how, begins):
    length, tile, _, stride = how
    assert places(*how) == begins
    assert 0 <= begins[-1] + tile - length < stride


@pytest.mark.parametrize(("how", "begins"), LAID)
def test_weights_sum_to_one_and_fall_off_towards_inner_edges_alone(how, begins):
    _, tile, _, stride = how
    side, at = tile // stride, [begin // stride for begin in begins]
    found, total = weights(at, side), torch.zeros(at[-1] + side, dtype=torch.float64)
    for begin, row in zip(at, found, strict=True):
        total[begin : begin + side] += row
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)
    assert found[0, 0] == 1
    assert found[-1, -1] == 1
    for one, other, row in zip(at, at[1:], found[1:], strict=False):
        shared = one + side - other
        if 2 * shared <= side:  # no third tile has a part
            expected = (torch.arange(shared, dtype=torch.float64) + 0.5) / shared
            torch.testing.assert_close(row[:shared], expected)
        assert 0 < row[0] < 0.5 if shared > 1 else row[0] == (0.5 if shared else 1)


def test_two_tiles_share_linearly():
    found = weights([0, 4], 8)
    expected = torch.tensor([7, 5, 3, 1], dtype=torch.float64) / 8
    assert torch.equal(found[0], torch.cat([torch.ones(4, dtype=torch.float64), expected]))
    assert torch.equal(found[1], torch.cat([expected.flip(0), torch.ones(4, dtype=torch.float64)]))


def test_tiles_that_touch_are_put_together_to_the_bit():
    images = torch.randn(2, 3, 64, 96)
    tiles = cut(images, [0, 32], [0, 32, 64], 32)
    assert torch.equal(tiles[8], images[1, :, :32, 64:])
    assert torch.equal(blended(tiles, [0, 32], [0, 32, 64], 32, (64, 96)), images)


def test_the_border_is_repeated_beyond_it():
    images = torch.arange(30, dtype=torch.uint8).view(1, 1, 5, 6)
    (tile,) = cut(images, [1], [2], 6)
    assert tile[0].tolist() == [[r + c for c in (2, 3, 4, 5, 5, 5)] for r in (6, 12, 18, 24, 24, 24)]


def test_a_position_is_the_weighted_mean_of_its_tiles():
    """By a loop over tiles and two dimensions at once."""
    rows, columns, tile, stride = places(60, 32, 16, 8), places(84, 32, 8, 8), 32, 8
    maps = torch.randn(2 * len(rows) * len(columns), 5, 4, 4, dtype=torch.float64)
    whole, total = torch.zeros(2, 5, 12, 16, dtype=torch.float64), torch.zeros(12, 16, dtype=torch.float64)
    down, across = (weights([begin // stride for begin in begins], 4) for begins in (rows, columns))
    for n, (i, j) in enumerate((i, j) for i in range(len(rows)) for j in range(len(columns))):
        y, x = rows[i] // stride, columns[j] // stride
        weight = down[i].unsqueeze(1) * across[j]
        whole[:, :, y : y + 4, x : x + 4] += weight * maps[n :: len(rows) * len(columns)]
        total[y : y + 4, x : x + 4] += weight
    assert total[:8, :11].allclose(torch.ones(8, 11, dtype=torch.float64))
    torch.testing.assert_close(blended(maps, rows, columns, tile, (60, 84)), whole[:, :, :8, :11])


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "sentence"),
    [
        (
            (64, 96),
            None,
            32,
            "overlap=32 applies only to tiles, but images are not cut into tiles: set tile, or overlap=0",
        ),
        ((64, 96), 80, 0, "tile=80 is larger than images of 64 x 96 px: choose 64 or less"),
        ((64, 96), 64, 64, "overlap=64 is not smaller than tile=64: choose 0 to 63"),
        ((64, 96), 40, 0, "tile=40 is not a multiple of 16 px.* choose 32 or 48"),
        ((72, 96), 70, 0, "tile=70 is not a multiple of 16 px.* choose 64"),
        ((64, 96), 32, 10, "overlap=10 is not a multiple of 16 px.* choose 0 or 16"),
        ((64, 96), 32, 20, "overlap=20 is not a multiple of 16 px.* choose 16"),
    ],
)
def test_tiles_that_cannot_be_are_refused(size, tile, overlap, sentence):
    with pytest.raises(PandaError, match=rf"{sentence}\.$"):
        require_tiles(size, tile, overlap, 16)


def test_tiles_of_any_image_that_holds_one():
    for size in ((64, 64), (65, 1000), (333, 64)):
        require_tiles(size, 64, 48, 16)
    require_tiles((7, 9), None, 0, 32)
