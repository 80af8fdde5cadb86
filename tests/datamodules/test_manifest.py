import hashlib
import os
import shutil

import numpy as np
import pytest

from panda_lightning import CIFAR10, Digits, ImageFolder
from tests.conftest import make_folder
from tests.datamodules.official import make_cifar10


def checksum(text):
    return hashlib.sha256(text.encode()).hexdigest()


def of(root, **options):
    return ImageFolder(root=str(root), normal_class="spot", **options).manifest()


def test_files_are_listed_in_order_with_split_and_label(tmp_path):
    make_folder(tmp_path / "images", train=2, normal=1, anomalous=1)
    expected = (
        "file,split,label\n"
        "train/spot/000.png,train,0\n"
        "train/spot/001.png,train,0\n"
        "test/spot/100.png,test,0\n"
        "test/stripe/000.png,test,1\n"
    )
    assert of(tmp_path / "images") == expected
    assert checksum(expected) == "b561fbfc1c659ed7629aa7735b155113a65ecc41d00a95cbde851b1a2c618a26"
    data = ImageFolder(root=str(tmp_path / "images"), normal_class="spot")
    assert data.manifest(["test"]).splitlines() == expected.splitlines()[:1] + expected.splitlines()[3:]


def test_it_does_not_depend_on_where_the_data_lie(folder, tmp_path, monkeypatch):
    text = of(folder)
    assert str(tmp_path) not in text
    shutil.copytree(folder, tmp_path / "elsewhere/deep")
    assert of(tmp_path / "elsewhere/deep") == text
    monkeypatch.chdir(tmp_path)
    assert of("elsewhere/deep") == of(f"elsewhere{os.sep}..{os.sep}images") == text


def test_the_checksum_changes_with_a_file_or_a_label(folder):
    first = checksum(of(folder))
    assert checksum(of(folder)) == first
    (folder / "test/spot/100.png").rename(folder / "test/stripe/100.png")
    moved = checksum(of(folder))
    (folder / "train/spot/000.png").rename(folder / "train/spot/999.png")
    renamed = checksum(of(folder))
    data = ImageFolder(root=str(folder), normal_class="spot", protocol="leave_one_out")
    relabelled = checksum(data.manifest(["test"]))
    usual = checksum(ImageFolder(root=str(folder), normal_class="spot").manifest(["test"]))
    assert len({first, moved, renamed, relabelled, usual, checksum(of(folder, train_limit=3))}) == 6


def test_a_comma_in_a_name_is_quoted(folder):
    (folder / "train/spot/000.png").rename(folder / "train/spot/a,b.png")
    assert '"train/spot/a,b.png",train,0\n' in of(folder)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("protocol", ["one_vs_rest", "leave_one_out"])
def test_rows_of_arrays_are_those_of_the_protocol(tmp_path, protocol, limit):
    make_cifar10(tmp_path)
    options = {"normal_class": 3, "protocol": protocol, "train_limit": limit, "test_limit": limit}
    for data in (CIFAR10(root=str(tmp_path), **options), Digits(**options)):
        lines = [line.split(",") for line in data.manifest().splitlines()[1:]]
        for split, images in (("train", data.normal_images), ("test", data.test_images)):
            rows = [int(row) for row, where, _ in lines if where == split]
            np.testing.assert_array_equal(data.read(split).sources[rows], images.sources)
            labels = [int(label) for _, where, label in lines if where == split]
            np.testing.assert_array_equal(labels, data.is_anomalous(images.targets))
