import io
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning import PandaError
from panda_lightning.datamodules import CIFAR10, Digits, ImageFolder, outliers
from panda_lightning.datamodules.base import Images
from panda_lightning.datamodules.outliers import apart_from, likeness, read_outliers
from panda_lightning.pictures.looking import look
from tests.datamodules.official import make_cifar10

DATASETS = {"CIFAR10": CIFAR10, "Digits": Digits}


def images(pictures):
    return Images(np.stack([np.asarray(p) for p in pictures]), np.zeros(len(pictures), dtype=np.int64))


def test_sources(tmp_path, folder, request):
    assert len(read_outliers(str(folder), DATASETS)) == 24
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "300K_random_images.npy", pixels)
    mapped = read_outliers(str(tmp_path / "300K_random_images.npy"), DATASETS)
    assert isinstance(mapped.sources, np.memmap)  # not loaded
    np.testing.assert_array_equal(mapped.sources, pixels)
    request.addfinalizer(lambda: torch.set_warn_always(False))
    torch.set_warn_always(True)  # of arrays that are not writable, too
    with warnings.catch_warnings(action="error"):
        mapped.fingerprint(tmp_path)
    make_cifar10(tmp_path)
    assert len(read_outliers(f"CIFAR10:{tmp_path}", DATASETS)) == 50


def test_what_is_none_is_refused(tmp_path):
    with pytest.raises(PandaError, match="nor a .npy file, nor CLASS:ROOT with one of CIFAR10, Digits"):
        read_outliers("CIFAR11:data", DATASETS)
    np.save(tmp_path / "x.npy", np.zeros((4, 32, 32)))
    with pytest.raises(PandaError, match=r"float64 \(4, 32, 32\): expected uint8 \(N, H, W, 3\)"):
        read_outliers(str(tmp_path / "x.npy"), DATASETS)
    np.save(tmp_path / "objects.npy", np.array([{}, None], dtype=object))  # pickled, and a pickle can run code
    np.savez(tmp_path / "zip", a=np.zeros(3))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:60])
    (tmp_path / "none.npy").write_bytes(b"")
    for name in ("objects", "zip", "cut", "none"):
        with pytest.raises(PandaError, match=rf"outliers=.*{name}.npy cannot be read \(.*expected uint8"):
            read_outliers(str(tmp_path / f"{name}.npy"), DATASETS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PandaError, match="has no images"):
        read_outliers(str(tmp_path / "empty"), DATASETS)


def scene(number, size=32):
    """A picture with the spectrum of natural ones, one over frequency, and a thing in front: (S, S, 3)."""
    rng = np.random.default_rng(number)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
    radius[0, 0] = np.inf
    waves = rng.normal(size=(2, 4, 96, 96)) / radius
    planes = np.fft.ifft2(waves[0] + 1j * waves[1]).real[:, :64, :64]
    planes = planes / planes.std(axis=(1, 2), keepdims=True)
    planes[3] += 2 * (np.hypot(*(np.mgrid[:64, :64] - rng.integers(16, 48, (2, 1, 1)))) < rng.integers(6, 16))
    rgb = 120 + 20 * planes[:3] + 30 * planes[3]
    image = Image.fromarray(rgb.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def shifted(image, right, down):
    rows, columns = (np.clip(np.arange(len(image)) - by, 0, len(image) - 1) for by in (down, right))
    return image[rows][:, columns]


def resized(image, size):
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def compressed(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


CHANGES = {
    "none": lambda a: a,
    "one pixel right": lambda a: shifted(a, 1, 0),
    "two pixels left and down": lambda a: shifted(a, -2, 2),
    "two pixels, black from the border": lambda a: np.pad(a[2:, 2:], ((0, 2), (0, 2), (0, 0))),
    "mirror": lambda a: a[:, ::-1],
    "middle": lambda a: resized(a[2:30, 2:30], 32),
    "corner": lambda a: resized(a[4:, :28], 32),
    "other place": lambda a: resized(a[1:29, 3:31], 32),
    "JPEG 90": lambda a: compressed(a, 90),
    "JPEG 50": lambda a: compressed(a, 50),
    "JPEG 20": lambda a: compressed(a, 20),
    "enlarged": lambda a: resized(a, 64),
    "grey": lambda a: np.asarray(Image.fromarray(a).convert("L").convert("RGB")),
    "brighter": lambda a: (a * 1.1).clip(0, 255).astype(np.uint8),
    "darker": lambda a: (a * 0.9).astype(np.uint8),
    "mirrored corner, JPEG 50": lambda a: compressed(resized(a[:28, 4:], 32)[:, ::-1], 50),
}


@pytest.fixture(scope="module")
def scenes():
    return [scene(n) for n in range(240)]


@pytest.mark.parametrize("change", CHANGES)
def test_test_images_are_found_however_changed(scenes, change):
    changed = [np.ascontiguousarray(CHANGES[change](a)) for a in scenes[:40]]
    assert apart_from(images(scenes[:80]), images(changed)).tolist() == []


def test_other_images_are_kept(scenes):
    assert apart_from(images(scenes[:40]), images(scenes[20:])).tolist() == list(range(20, 220))


@pytest.mark.parametrize(("rows", "threads"), [(7, 2), (8192, 1)])
def test_every_image_is_compared_with_every_test_image(scenes, monkeypatch, rows, threads, one_thread):
    """Tried against all windows at once, whatever the parts in which the search goes."""
    monkeypatch.setattr(outliers, "ROWS", rows)
    torch.set_num_threads(threads)
    test, others = scenes[:70], [*scenes[100:105], *map(CHANGES["corner"], scenes[60:75])]
    grey = [torch.from_numpy(np.stack(part)).float() @ torch.tensor([0.299, 0.587, 0.114]) for part in (test, others)]
    queries = torch.stack([outliers._spectrum(grey[1]), outliers._spectrum(grey[1][:, 2:30, 2:30])])
    every = torch.einsum("qrd,tmijd->rqtmij", queries, outliers._windows(grey[0])).flatten(1).amax(dim=1)
    found = likeness(images(test), images(others))
    assert torch.get_num_threads() == threads
    assert (every > outliers.SAME).tolist() == [False] * 5 + [True] * 10 + [False] * 5
    sure = every > outliers.SAME
    np.testing.assert_allclose(found[sure], every[sure], atol=1e-5)
    assert (found[~sure] <= every[~sure].numpy() + 1e-5).all()


def test_flat_images_are_the_same_only_if_equal():
    """They have no correlation, and rounding must not make one up."""
    flat = [np.full((32, 32, 3), shade, dtype=np.uint8) for shade in (0, 255, 7, 100)]
    almost = [f + np.eye(32, dtype=np.uint8)[..., None] for f in flat[2:]]
    assert apart_from(images(flat[:2]), images([*flat, *almost])).tolist() == [2, 3, 4, 5]


def test_files_are_read_once_and_compared_with_arrays(scenes, tmp_path, monkeypatch):
    for n in (3, 50, 70):
        Image.fromarray(scene(n, 64)).save(tmp_path / f"{n}.png")  # larger than the test image
        Image.fromarray(scene(n, 64)).convert("L").save(tmp_path / f"{n}_grey.jpg", quality=70)
    (tmp_path / "60.png").write_bytes(b"no picture")
    (tmp_path / "61.png").write_bytes(b"")
    found = read_outliers(str(tmp_path), DATASETS)
    read = []
    monkeypatch.setattr(outliers, "look", lambda view, source: read.append(source) or look(view, source))
    kept = apart_from(images(scenes[:40]), found)
    assert [found.sources[i].name for i in kept] == [
        "50.png",
        "50_grey.jpg",
        "60.png",
        "61.png",
        "70.png",
        "70_grey.jpg",
    ]
    assert sorted(str(path) for path in read if isinstance(path, Path)) == sorted(map(str, found.sources))
    assert apart_from(found, images(scenes[:52])).tolist() == [*range(3), *range(4, 50), 51]
    assert apart_from(images(scenes[:40]), found.take(np.array([4, 5]))).tolist() == [0, 1]  # nothing to compare


def test_the_data_module_hands_them_out_filtered_and_counted(folder, caplog):
    others = folder.parent / "others"
    shutil.copytree(folder / "test", others)
    for n in range(9):
        Image.fromarray(scene(n)).save(others / f"{n}.png")
    data = ImageFolder(root=str(folder), normal_class="spot", outliers=str(others), image_size=32, batch_size=4)
    data.setup("fit")
    with caplog.at_level("INFO"):
        loader = data.outlier_dataloader()
    assert "13 of 22 outliers are test images or near duplicates of them, and are left out" in caplog.text
    assert [Path(p).name for p in loader.dataset.images.sources] == [f"{n}.png" for n in range(9)]
    batches = list(loader)
    assert batches[0]["image"].shape == (4, 3, 32, 32)
    assert all(b["label"].bool().all() for b in batches)  # outliers are anomalous by definition


def test_where_all_are_test_images_others_are_asked_for(folder):
    data = ImageFolder(root=str(folder), normal_class="spot", outliers=str(folder / "test"))
    data.setup("fit")
    with pytest.raises(PandaError, match="all images of data.outliers are test images: give other images"):
        data.outlier_dataloader()


def test_without_a_source_the_option_is_named(folder):
    data = ImageFolder(root=str(folder), normal_class="spot")
    data.setup("fit")
    with pytest.raises(PandaError, match="data.outliers"):
        data.outlier_dataloader()


@pytest.mark.slow
def test_real_outliers(shared, tmp_path):
    """Tiny-ImageNet beside some of itself: next to nothing else is left out."""
    subprocess.run([shared / "data/unpack", tmp_path, "tiny_imagenet"], check=True)
    found = read_outliers(str(tmp_path / "tiny_imagenet"), DATASETS)
    assert len(found) == 10000
    kept = apart_from(found.take(np.arange(0, 10000, 50)), found.take(np.arange(0, 10000, 5)))
    assert 1780 <= len(kept) <= 1800  # but for the 200 themselves
