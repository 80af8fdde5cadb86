"""Resizing in tensors: the same pixels as Pillow's."""

import numpy as np
import pytest
import torch

from panda_lightning.pictures.resampling import fitted
from panda_lightning.pictures.view import View

SIDES = [(64, 64), (500, 333), (333, 500), (700, 210), (31, 640), (640, 31), (1, 90), (17, 5), (72, 72), (65, 129)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop", "before"), [("center", None), ("squash", None), ("center", "crop")])
def test_pixels_are_pillows_bit_for_bit(interpolation, crop, before):
    draw = np.random.default_rng(0)
    view = View(64, crop, 72, interpolation, before)
    for sides in [*SIDES, *draw.integers(3, 400, (8, 2))]:
        picture = draw.integers(0, 256, (*sides, 3), dtype=np.uint8)
        found = fitted(torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0), view)
        assert found.dtype == torch.uint8
        np.testing.assert_array_equal(found[0].numpy(), view(picture), err_msg=f"{sides}")


@pytest.mark.parametrize("size", [(40, 96), (96, 33), (8, 90)])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_rectangles_are_pillows_bit_for_bit(size, crop):
    draw = np.random.default_rng(1)
    view = View(size, crop, round(min(size) / 0.875), "bilinear")
    for sides in [*SIDES, (3, 900), (900, 3), *draw.integers(3, 300, (6, 2))]:
        picture = draw.integers(0, 256, (*sides, 3), dtype=np.uint8)
        found = fitted(torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0), view)[0].numpy()
        assert found.shape == (3, *size)
        np.testing.assert_array_equal(found, view(picture), err_msg=f"{sides}")


def test_a_batch_is_its_pictures():
    pictures = torch.randint(0, 256, (3, 3, 90, 50), dtype=torch.uint8, generator=torch.manual_seed(0))
    view = View(32, "center", 40, "bicubic")
    assert torch.equal(fitted(pictures, view), torch.cat([fitted(one, view) for one in pictures.split(1)]))


def test_pictures_of_the_final_size_stay_as_they_are():
    pictures = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.manual_seed(0))
    for interpolation in ("bilinear", "bicubic"):
        assert torch.equal(fitted(pictures, View(48, "squash", 48, interpolation)), pictures)
        assert torch.equal(fitted(pictures, View(48, "center", 48, interpolation)), pictures)
