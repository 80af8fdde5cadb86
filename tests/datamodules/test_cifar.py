import subprocess

import numpy as np
import pytest
from torchvision import datasets as official

from panda_lightning import PandaError
from panda_lightning.datamodules import CIFAR10, CIFAR100, cifar
from tests.datamodules.official import SUPERCLASS, make_cifar10, make_cifar100, pack_cifar


def test_pickles_are_read_as_torchvision_reads_them(tmp_path, monkeypatch):
    make_cifar10(tmp_path)
    monkeypatch.setattr(official.CIFAR10, "_check_integrity", lambda self: True)  # ours are not the official bytes
    monkeypatch.setattr(official.CIFAR10, "_load_meta", lambda self: None)
    for split in ("train", "test"):
        there = official.CIFAR10(str(tmp_path), train=split == "train")
        here = CIFAR10(root=str(tmp_path)).read(split)
        np.testing.assert_array_equal(here.sources, there.data)
        np.testing.assert_array_equal(here.targets, there.targets)


def test_addresses_and_checksums_are_torchvisions():
    for ours, theirs in ((CIFAR10, official.CIFAR10), (CIFAR100, official.CIFAR100)):
        assert (ours.url, ours.checksum, ours.folder) == (theirs.url, f"md5:{theirs.tgz_md5}", theirs.base_folder)


def test_cifar100_is_read_by_superclass(tmp_path):
    make_cifar100(tmp_path)
    data = CIFAR100(root=str(tmp_path), normal_class="fish")
    data.setup("fit")
    assert len(data.classes) == len(set(SUPERCLASS.values())) == 20
    assert len(data.normal_images) == 3
    np.testing.assert_array_equal(data.test_images.targets, np.arange(40) % 20)
    assert data.test_images.sources.shape == (40, 32, 32, 3)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_files_that_are_there_are_not_fetched(tmp_path, monkeypatch, kind):
    make_cifar10(tmp_path)
    make_cifar100(tmp_path)
    monkeypatch.setattr(cifar, "fetch", lambda *a: pytest.fail("fetched"))
    kind(root=str(tmp_path)).prepare_data()


def test_a_missing_batch_is_named(tmp_path):
    make_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(PandaError, match="data_batch_3 is missing"):
        CIFAR10(root=str(tmp_path)).read("train")


@pytest.mark.slow
def test_real_images_of_cifar10(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "cifar10"], check=True)
    pack_cifar(tmp_path / "cifar10", tmp_path)
    data = CIFAR10(root=str(tmp_path), normal_class="airplane")
    data.setup("fit")
    assert len(data.normal_images) == 5000
    assert np.bincount(data.test_images.targets).tolist() == [1000] * 10


@pytest.mark.slow
def test_real_images_of_cifar100(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "cifar100"], check=True)
    pack_cifar(tmp_path / "cifar100", tmp_path, coarse=True)
    data = CIFAR100(root=str(tmp_path), normal_class="fish")
    data.setup("fit")
    assert np.bincount(data.read("test").targets).tolist() == [250] * 20
    assert len(data.normal_images) == 2500
