import gzip
import hashlib
import subprocess

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST as Official

from panda_lightning import PandaError
from panda_lightning.datamodules import FashionMNIST
from tests.datamodules.official import make_fashion_mnist


def test_idx_files_are_read_as_torchvision_reads_them(tmp_path):
    make_fashion_mnist(tmp_path)
    for split in ("train", "test"):
        there = Official(str(tmp_path), train=split == "train")
        here = FashionMNIST(root=str(tmp_path)).read(split)
        np.testing.assert_array_equal(here.sources, there.data)
        np.testing.assert_array_equal(here.targets, there.targets)
    assert FashionMNIST.classes == tuple(Official.classes)


def test_missing_files_are_fetched_checked_and_unzipped(tmp_path, monkeypatch):
    make_fashion_mnist(tmp_path / "server")
    mirror, resources = tmp_path / "mirror", []
    mirror.mkdir()
    for path in sorted((tmp_path / "server/FashionMNIST/raw").iterdir()):
        packed = mirror / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(Official, "mirrors", [f"{mirror.as_uri()}/"])
    monkeypatch.setattr(Official, "resources", resources)
    data = FashionMNIST(root=str(tmp_path / "here"), normal_class="Sandal")
    data.prepare_data()
    data.setup("fit")
    assert (len(data.normal_images), len(data.test_images)) == (5, 20)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PandaError, match="t10k-images-idx3-ubyte is missing"):
        FashionMNIST(root=str(tmp_path)).read("test")


@pytest.mark.slow
def test_real_images(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "fashion_mnist"], check=True)
    data = FashionMNIST(root=str(tmp_path), normal_class="Sandal")
    data.prepare_data()
    data.setup("fit")
    assert len(data.normal_images) == 6000
    assert np.bincount(data.test_images.targets).tolist() == [1000] * 10
