import numpy as np
import pytest
from torchvision.datasets import CIFAR10 as Official  # noqa: N811

from panda_lightning import CIFAR10, PandaError
from panda_lightning.datamodules import cifar
from tests.datamodules.official import make_cifar10


def test_pickles_are_read_as_torchvision_reads_them(tmp_path, monkeypatch):
    make_cifar10(tmp_path)
    monkeypatch.setattr(Official, "_check_integrity", lambda self: True)  # ours are not the official bytes
    monkeypatch.setattr(Official, "_load_meta", lambda self: None)
    for split in ("train", "test"):
        official, images = Official(str(tmp_path), train=split == "train"), CIFAR10(root=str(tmp_path)).read(split)
        np.testing.assert_array_equal(images.sources, official.data)
        np.testing.assert_array_equal(images.targets, official.targets)


def test_files_that_are_there_are_not_fetched(tmp_path, monkeypatch):
    make_cifar10(tmp_path)
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *a, **k: pytest.fail("fetched"))
    CIFAR10(root=str(tmp_path)).prepare_data()


def test_without_network_the_way_out_is_named(tmp_path, monkeypatch):
    def refuse(url, root, md5):
        assert (url, md5) == (CIFAR10.URL, "c58f30108f718f92721af3b95e74349a")
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", refuse)
    with pytest.raises(PandaError, match=r"cannot be downloaded \(no route to host\).*--data.root"):
        CIFAR10(root=str(tmp_path)).prepare_data()


def test_a_missing_batch_is_named(tmp_path):
    make_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(PandaError, match="data_batch_3 is missing"):
        CIFAR10(root=str(tmp_path)).read("train")
