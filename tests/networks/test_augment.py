"""Each operation on a batch against torchvision's on each image, or a plain loop."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from panda_lightning.networks import augment

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(6, 3, 24, 24, generator=GENERATOR)
FACTORS = torch.tensor([0.6, 0.8, 1.0, 1.1, 1.3, 1.4])


def test_contrast_normalisation_is_that_of_a_plain_loop():
    got = augment.contrast_normalize((IMAGES * 255).byte()).numpy()
    for image, result in zip((IMAGES * 255).byte().numpy().astype(float), got, strict=True):
        centred = image - image.sum() / image.size
        np.testing.assert_allclose(result, centred / (np.abs(centred).sum() / image.size), rtol=1e-4, atol=1e-5)


def test_colours_change_as_torchvision_changes_them():
    for ours, theirs, values in (
        (augment.brighten, tv.adjust_brightness, FACTORS),
        (augment.change_contrast, tv.adjust_contrast, FACTORS),
        (augment.saturate, tv.adjust_saturation, FACTORS),
        (augment.shift_hue, tv.adjust_hue, torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.1, 0.5])),
    ):
        expected = torch.stack([theirs(image, float(v)) for image, v in zip(IMAGES, values, strict=True)])
        torch.testing.assert_close(ours(IMAGES, values), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(augment.grey(IMAGES), tv.rgb_to_grayscale(IMAGES, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "kernel"), [(24, 24, 13), (5, 24, 9), (24, 4, 7)])
def test_blur_is_torchvisions(height, width, kernel):
    images, sigma = IMAGES[:, :, :height, :width], torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 1e-3])
    expected = [tv.gaussian_blur(i, [kernel] * 2, [float(s)] * 2) for i, s in zip(images, sigma, strict=True)]
    torch.testing.assert_close(augment.blur(images, sigma), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_resized_crop_is_torchvisions():
    cut = torch.zeros(6, dtype=torch.bool)
    cut[1] = True
    # half the width and a quarter of the height, at the left and three quarters down the room: pixels 0..12, 13.5..19.5
    area, ratio = torch.full((6,), 0.125), torch.full((6,), 2.0)
    got = augment.resized_crop(IMAGES, area, ratio, torch.tensor([0.0, 2 / 3]).expand(6, 2), cut)
    expected = tv.resize(IMAGES[:, :, 12:18, :12], [24, 24], antialias=False)
    inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))  # at its edges ours sees the pixels outside
    expected[1] = expected[1].flip(-1)
    torch.testing.assert_close(got[inside], expected[inside], rtol=1e-4, atol=1e-4)
    whole = augment.resized_crop(IMAGES, torch.ones(6), torch.ones(6), torch.rand(6, 2), ~cut)
    torch.testing.assert_close(whole[0], IMAGES[0].flip(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[1], IMAGES[1], rtol=1e-5, atol=1e-5)


def test_turns_and_shifts_are_those_of_numpy():
    images = (IMAGES * 255).byte()
    quarters, right, down = (
        torch.tensor([0, 1, 2, 3, 1, 0]),
        torch.tensor([0, 6, -6, 6, 0, -6]),
        torch.tensor([0, -6, 6, 6, 6, 0]),
    )
    got = augment.turn_and_shift(images, quarters, right, down)
    for i, image in enumerate(images.numpy()):
        padded = np.pad(np.rot90(image, int(quarters[i]), (1, 2)), ((0, 0), (6, 6), (6, 6)), mode="reflect")
        top, left = 6 - int(down[i]), 6 - int(right[i])
        np.testing.assert_array_equal(got[i], padded[:, top : top + 24, left : left + 24])


def test_crops_are_windows_of_the_padded_image():
    images = (IMAGES * 255).byte()
    draws = torch.tensor(
        [[0.0, 0.0, 0.9], [0.999, 0.0, 0.9], [0.5, 0.5, 0.9], [0.5, 0.5, 0.1], [0.2, 0.9, 0.1], [0, 0.999, 0.1]]
    )
    got = augment.crop_and_flip(images, draws, padding=4)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    for i, (down, right, mirror) in enumerate(draws.tolist()):
        top, left = int(down * 9), int(right * 9)
        window = padded[i, :, top : top + 24, left : left + 24]
        if mirror < 0.5:  # the window's columns in reverse
            left = int(right * 9) - 4
            columns = [abs(c + left) for c in range(23, -1, -1)]
            columns = [46 - c if c > 23 else c for c in columns]
            rows = [abs(r + top - 4) for r in range(24)]
            rows = [46 - r if r > 23 else r for r in rows]
            window = images[i].numpy()[:, rows][:, :, columns]
        np.testing.assert_array_equal(got[i], window)


def test_views_depend_on_their_draws_alone():
    images, draws = (IMAGES * 255).byte(), torch.rand(6, augment.VIEW_DRAWS, generator=GENERATOR)
    views = augment.random_view(images, draws)
    assert views.dtype == torch.uint8
    assert views.shape == images.shape
    for i in range(6):
        one = augment.random_view(images[i : i + 1], draws[i : i + 1])[0].int()
        assert (one - views[i].int()).abs().max() <= 1  # rounding
    still = torch.tensor([[1.0, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]])  # all of it, and nothing else
    torch.testing.assert_close(augment.random_view(images[:1], still), images[:1])
    grey = still.clone()
    grey[0, 10] = 0
    assert (augment.random_view(images[:1], grey)[0].float().std(dim=0) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_view_is_the_same_in_runs_of_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=generator)
    numbers = torch.rand(8, augment.VIEW_DRAWS, generator=generator)
    expected = augment.random_view(images, numbers)
    with torch.autocast("cpu", dtype):
        assert torch.equal(augment.random_view(images, numbers), expected)
