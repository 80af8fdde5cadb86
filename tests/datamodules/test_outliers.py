import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panda_lightning import PandaError
from panda_lightning.datamodules import CIFAR10, Digits, ImageFolder
from panda_lightning.datamodules.base import Images
from panda_lightning.datamodules.outliers import apart_from, read_outliers
from tests.conftest import picture
from tests.datamodules.official import make_cifar10

DATASETS = {"CIFAR10": CIFAR10, "Digits": Digits}


def images(pictures):
    return Images(np.stack([np.asarray(p) for p in pictures]), np.zeros(len(pictures), dtype=np.int64))


def test_sources(tmp_path, folder):
    assert len(read_outliers(str(folder), DATASETS)) == 24
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "300K_random_images.npy", pixels)
    mapped = read_outliers(str(tmp_path / "300K_random_images.npy"), DATASETS)
    assert isinstance(mapped.sources, np.memmap)  # not loaded
    np.testing.assert_array_equal(mapped.sources, pixels)
    make_cifar10(tmp_path)
    assert len(read_outliers(f"CIFAR10:{tmp_path}", DATASETS)) == 50


def test_what_is_none_is_refused(tmp_path):
    with pytest.raises(PandaError, match="nor a .npy file, nor CLASS:ROOT with one of CIFAR10, Digits"):
        read_outliers("CIFAR11:data", DATASETS)
    np.save(tmp_path / "x.npy", np.zeros((4, 32, 32)))
    with pytest.raises(PandaError, match=r"float64 \(4, 32, 32\): expected uint8 \(N, H, W, 3\)"):
        read_outliers(str(tmp_path / "x.npy"), DATASETS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PandaError, match="holds no images"):
        read_outliers(str(tmp_path / "empty"), DATASETS)


def test_copies_of_test_images_are_found_whatever_their_form(tmp_path):
    test = [picture("spot", n) for n in range(5)]
    picture("spot", 1).save(tmp_path / "again.jpg", quality=70)
    candidates = [
        test[0],  # the same
        Image.open(tmp_path / "again.jpg").convert("RGB"),  # compressed
        test[2].resize((17, 17)).resize((40, 40)),  # made smaller
        picture("spot", 50),  # another
        picture("stripe", 2),
    ]
    assert apart_from(images(test), images(candidates)).tolist() == [3, 4]


def test_the_data_module_hands_them_out_filtered_and_counted(folder, caplog):
    data = ImageFolder(root=str(folder), normal_class="spot", outliers=str(folder), image_size=32, batch_size=4)
    data.setup("fit")
    with caplog.at_level("INFO"):
        loader = data.outlier_dataloader()
    assert "13 of 24 outliers are test images, or nearly, and are left out" in caplog.text
    assert {Path(p).parent.name for p in loader.dataset.images.sources} == {"spot"}
    assert len(loader.dataset) == 11
    batches = list(loader)
    assert batches[0]["image"].shape == (4, 3, 32, 32)
    assert all(b["label"].bool().all() for b in batches)  # outliers are anomalous by definition


def test_without_a_source_the_option_is_named(folder):
    data = ImageFolder(root=str(folder), normal_class="spot")
    data.setup("fit")
    with pytest.raises(PandaError, match="data.outliers"):
        data.outlier_dataloader()


@pytest.mark.slow
def test_real_outliers(shared, tmp_path):
    """Tiny-ImageNet beside CIFAR-10's kind of images: next to nothing is a copy."""
    subprocess.run([shared / "data/unpack", tmp_path, "tiny_imagenet", "mvtec"], check=True)
    outliers = read_outliers(str(tmp_path / "tiny_imagenet"), DATASETS)
    assert len(outliers) == 10000
    some = outliers.take(np.arange(0, 10000, 5))
    test = outliers.take(np.arange(0, 10000, 500))
    kept = apart_from(test, some)
    assert 1975 <= len(kept) <= 1980  # the 20 themselves, and few that look the same at 8 x 8
