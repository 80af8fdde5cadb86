import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from panda_lightning.pictures.view import View
from tests.conftest import picture


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1), (3, 20000)])
def test_narrow_images(tmp_path, size, crop):
    Image.linear_gradient("L").resize(size).save(tmp_path / "a.png")
    pixels = View(224, crop, 256, "bilinear")(tmp_path / "a.png")
    assert pixels.shape == (3, 224, 224)
    assert abs(float(pixels.mean()) - 127.5) < 3


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_views_are_torchvisions(how):
    image = picture("stripe", 0).resize((50, 37))
    mode = transforms.InterpolationMode(how)
    squash = transforms.Resize((32, 32), mode)(image)
    np.testing.assert_array_equal(View(32, "squash", 0, how)(np.asarray(image)), np.asarray(squash).transpose(2, 0, 1))
    centre = transforms.CenterCrop(28)(transforms.Resize(32, mode)(image))
    got = View(28, "center", 32, how)(np.asarray(image))
    assert np.abs(got.astype(int) - np.asarray(centre).transpose(2, 0, 1)).mean() < 4  # widths may round apart by one
    even = picture("stripe", 1, 64)
    centre = transforms.CenterCrop(28)(transforms.Resize(32, mode)(even))
    np.testing.assert_array_equal(View(28, "center", 32, how)(np.asarray(even)), np.asarray(centre).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    rgb = picture("spot", 0)
    if mode == "I;16":
        image = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) << 8) + 77)
    else:
        image = rgb.convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    image.save(path)
    got = View(40, "squash", 0, "bilinear")(path)
    assert got.shape == (3, 40, 40)
    expected = np.asarray(rgb.convert("L" if mode in ("L", "LA", "I;16") else "RGB"))
    if mode not in ("P", "1"):
        expected = expected.transpose(2, 0, 1) if expected.ndim == 3 else expected[None].repeat(3, 0)
        assert np.abs(got.astype(int) - expected).max() <= 2


def coordinates(width, height):
    """A picture that says where each of its pixels is: red from left to right, green from top to bottom."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=2).astype(np.uint8)


VIEWS = [
    View(64, "center", 73, "bilinear"),
    View(64, "squash", 64, "bilinear"),
    View((48, 96), "center", 55, "bilinear"),
    View((96, 40), "center", 40, "bicubic"),
    View((50, 70), "squash", 50, "bilinear"),
    View(48, "none", 48, "bilinear", multiple=16),
    View(64, "center", 70, "bilinear", before="crop"),
]


@pytest.mark.parametrize("size", [(200, 120), (90, 250), (128, 128), (250, 31)])
@pytest.mark.parametrize("view", VIEWS, ids=lambda v: f"{v.crop}-{v.size}-{v.before}")
def test_a_view_that_is_undone_shows_every_pixel_where_it_was(view, size):
    picture = coordinates(*size)
    shown = torch.from_numpy(view(picture).astype(np.float32))
    assert shown.shape[1:] == view.shape(size)
    left, top, right, bottom = view.box(size)
    for channel, low, high in ((0, left, right), (1, top, bottom)):
        back = view.undone(shown[channel], size)
        assert back.shape == size[::-1]
        truth = torch.from_numpy(picture[..., channel].astype(np.float32))
        y, x = np.mgrid[: size[1], : size[0]] + 0.5
        seen = torch.from_numpy((x > left) & (x < right) & (y > top) & (y < bottom))
        assert torch.equal(~back.isnan(), seen)
        scale = (high - low) / shown.shape[2 - channel]  # pixels of the picture for one of the view
        step = max(1, scale)
        inner = seen & (truth > low + 2 * step) & (truth < high - 2 * step - 1)  # edges are averages of fewer pixels
        assert inner.any()
        assert float((back - truth)[inner].abs().max()) < 0.5 * step + 0.6
        assert abs(float((back - truth)[inner].mean())) <= 0.15 * scale + 0.5  # nothing is shifted, but for rounding


def test_the_middle_of_a_very_narrow_image_is_its_middle():
    view = View(64, "center", 64, "bilinear")
    np.testing.assert_allclose(view.box((1000, 4)), (498, 0, 502, 4))
    np.testing.assert_allclose(view.box((4, 1000)), (0, 498, 4, 502))
    np.testing.assert_allclose(View((32, 128), "center", 32, "bilinear").box((8, 1000)), (0, 499, 8, 501))


def test_a_rectangle_of_an_image_of_its_shape_is_that_image():
    image = picture("stripe", 0, 64).resize((128, 64))
    whole = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(View((64, 128), "center", 64, "bilinear")(np.asarray(image)), whole)
    np.testing.assert_array_equal(View(64, "none", 64, "bilinear")(np.asarray(image)), whole)


@pytest.mark.parametrize(
    ("size", "multiple", "shape"),
    [((300, 200), 1, (64, 96)), ((200, 300), 1, (96, 64)), ((1200, 300), 14, (70, 252)), ((30, 20), 32, (64, 96))],
)
def test_images_keep_their_shape(size, multiple, shape):
    view = View(64, "none", 64, "bilinear", multiple=multiple)
    assert view.shape(size) == shape == view(coordinates(*size) % 255).shape[1:]
    assert view.sides is None
    assert View.of(view.words) == view


def test_what_is_too_narrow_to_keep_its_shape_is_an_error():
    with pytest.raises(ValueError, match="6400 x 99 pixels are too narrow for crop=none"):
        View(64, "none", 64, "bilinear").shape((6400, 99))


def test_words_of_squares_are_those_of_earlier_versions():
    view = View(224, "center", 256, "bilinear")
    words = {"image_size": 224, "crop": "center", "resize": 256, "interpolation": "bilinear", "before": None,
             "intensity": "auto"}  # fmt: skip
    assert view.words == words
    assert View.of(words) == view
    rectangle = View((64, 128), "center", 73, "bilinear")
    assert rectangle.words["image_size"] == [64, 128]
    assert View.of(rectangle.words) == rectangle
