import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning import ImageFolder, PandaError
from panda_lightning.pictures import looking
from panda_lightning.pictures.images import GAP, Images
from tests.conftest import make_folder, make_mixed


def test_facts_are_the_same_from_memory_and_from_disk(tmp_path, folder):
    make = {"root": str(folder), "normal_class": "spot", "image_size": 32}
    (folder / "ground_truth/stripe").mkdir(parents=True)
    for number in range(5):
        mask = np.zeros((40, 40), np.uint8)
        mask[: 4 + number] = 1
        Image.fromarray(mask).save(folder / f"ground_truth/stripe/{number:03d}.png")
    memory, disk = (next(iter(ImageFolder(memory_gb=gb, **make).test_dataloader())) for gb in (4, 0))
    assert memory.keys() == disk.keys() == {"image", "label", "index", "mask", "has_mask"}
    for name in memory:
        assert memory[name].equal(disk[name])
    assert memory["has_mask"].tolist() == [True] * 12 + [False]


def spoilt(root):
    make_folder(root)
    (root / "train/spot/900.png").write_bytes(b"")
    (root / "test/stripe/901.png").write_bytes(b"this is text")
    whole = (root / "test/spot/100.png").read_bytes()
    (root / "test/spot/902.png").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_unreadable_images_are_refused_by_name(tmp_path, memory_gb):
    data = ImageFolder(root=str(spoilt(tmp_path)), normal_class="spot", memory_gb=memory_gb)
    data.setup("fit")
    with pytest.raises(PandaError, match=r"1 of 12 images cannot be read: .*900.png \(empty file\).*on_error=skip"):
        data.normal_dataloader()
    with pytest.raises(PandaError, match=r"2 of 15 .*902.png \(.*901.png \(not an image\)"):
        data.val_dataloader()


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_unreadable_images_are_skipped_and_counted(tmp_path, memory_gb):
    data = ImageFolder(
        root=str(spoilt(tmp_path)), normal_class="spot", on_error="skip", memory_gb=memory_gb, num_workers=0
    )
    data.setup("fit")
    with pytest.warns(UserWarning, match="1 of 12 images cannot be read and are left out: .*900.png"):
        assert len(data.normal_dataloader().dataset) == 11
    with pytest.warns(UserWarning, match="2 of 15"):
        loader = data.val_dataloader()
    assert torch.cat([b["label"] for b in loader]).tolist() == [0] * 7 + [1] * 6


def test_disk_and_memory_give_the_same_batches(folder):
    options = {"root": str(folder), "normal_class": "spot", "image_size": 16, "eval_batch_size": 5}
    memory, disk = ImageFolder(**options), ImageFolder(**options, memory_gb=0, num_workers=2)
    for data in (memory, disk):
        data.setup("test")
    for a, b in zip(memory.test_dataloader(), disk.test_dataloader(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_fingerprints_are_those_that_checkpoints_hold(tmp_path):
    names = ("train/good/b.png", "train/good/deep/a.jpg", "train/good/B.PNG", "train/good/zä.png", "test/good/1.png")
    for i, name in enumerate((*names, "test/bad/2.png", "test/bad/2.b.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * (i + 1))
        os.utime(tmp_path / name, ns=(10**18 + i, 10**18 + i))
    data = ImageFolder(str(tmp_path))
    found = [data.test_images.fingerprint(tmp_path, times) for times in (False, True)]
    assert found == ["370f083fdc1892cd", "c6e0d604edb829b3"]  # recorded when sources were a list of paths
    listing, targets = list(data.test_images.sources), data.test_images.targets
    assert [Images(listing, targets).fingerprint(tmp_path, times) for times in (False, True)] == found
    (tmp_path / "test/bad/2.png").write_bytes(b"y" * 6)
    assert Images(listing, targets).fingerprint(tmp_path) == found[0]
    assert Images(listing, targets).fingerprint(tmp_path, True) != found[1]
    assert data.test_images.fingerprint(tmp_path, True) == found[1]  # as they were listed
    data.setup("test")
    assert data.test_images.fingerprint(tmp_path, True) != found[1]


def test_of_many_files_on_disk_some_are_looked_at_beforehand(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(looking, "SAMPLE", 4)
    options = {"root": str(make_folder(tmp_path)), "normal_class": "spot", "memory_gb": 0, "num_workers": 0}
    whole = (tmp_path / "train/spot/001.png").read_bytes()
    (tmp_path / "train/spot/001.png").write_bytes(whole[: len(whole) // 2])
    data = ImageFolder(**options)
    loader = data.normal_dataloader()
    assert (
        "11 normal training images, 224 px, read from disk at every access: decoded they take 1.6 MiB, more than "
        "memory_gb=0 allows. If each process has that much memory, set data.memory_gb=1."
    ) in caplog.text
    assert " 4 normal training images decoded in" in caplog.text
    assert "4 of 11 images are checked beforehand; `panda check-data` and data.on_error=skip check all" in caplog.text
    assert len(loader.dataset) == 11
    with pytest.raises(
        PandaError, match=r"train/spot/001\.png cannot be read \(.*\): repair or remove it, or set data"
    ):
        list(loader)
    with pytest.raises(PandaError, match=r"1 of 11 images cannot be read"):
        ImageFolder(**options | {"memory_gb": 1}).normal_dataloader()
    with pytest.warns(UserWarning, match="1 of 11 images cannot be read and are left out"):
        assert len(ImageFolder(**options, on_error="skip").normal_dataloader().dataset) == 10
    (tmp_path / "train/spot/002.png").write_bytes(b"")  # which needs no look
    with pytest.raises(PandaError, match=r"1 of 5 images cannot be read: .*002\.png \(empty file\)"):
        ImageFolder(**options).normal_dataloader()


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_images_that_keep_their_shape_come_in_batches_of_one_size(tmp_path, memory_gb):
    options = {"root": str(make_mixed(tmp_path)), "normal_class": "spot", "crop": "none", "image_size": 32}
    data = ImageFolder(**options, memory_gb=memory_gb, num_workers=0, batch_size=4, eval_batch_size=3)
    data.setup("fit")
    for loader in (data.normal_dataloader(), data.val_dataloader(), data.train_dataloader()):
        shapes, rows = set(), []
        for batch in loader:
            real = batch["index"] >= 0
            rows += batch["index"][real].tolist()
            shapes.add(tuple(batch["image"].shape[2:]))
            for row, image in zip(batch["index"][real].tolist(), batch["image"][real], strict=True):
                assert np.array_equal(image, data.view(loader.dataset.images.sources[row]))
            for row, mask in zip(batch["index"].tolist(), batch.get("mask", ()), strict=False):
                file = loader.dataset.images.masks[row]
                wanted = (
                    data.view.mask(file, loader.dataset.images.sources[row]) if file else np.zeros(mask.shape, bool)
                )
                assert np.array_equal(mask, wanted)
        assert shapes == {(32, 32), (32, 64), (45, 32)}
        assert sorted(rows) == list(range(len(loader.dataset)))


def test_a_batch_of_several_sizes_is_refused(tmp_path):
    data = ImageFolder(root=str(make_mixed(tmp_path)), normal_class="spot", crop="none", image_size=32)
    data.setup("fit")
    with pytest.raises(PandaError, match="a batch has images of different sizes"):
        data.normal_dataloader().dataset.__getitems__([0, 1])
    shown = data.normal_dataloader().dataset
    for row in range(3):  # a filler is one of its batch
        first, filler = shown.__getitems__([row, -1, GAP])["image"]
        assert first.equal(filler)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": [32, 64], "crop": "none"}, r"crop=none keeps.*image_size=\[32, 64\] is a fixed.*image_size=32"),
        ({"image_size": [32, 64], "resize": 20}, "resize=20 is smaller than image_size=32"),
    ],
)
def test_sizes_that_cannot_be_are_refused(folder, options, sentence):
    with pytest.raises(PandaError, match=sentence):
        ImageFolder(root=str(folder), normal_class="spot", **options).setup("fit")


@pytest.mark.parametrize("size", [[32], [32, 32, 32], [32, 0], "32"])
def test_a_list_of_other_than_two_sides_is_refused(folder, size):
    with pytest.raises(PandaError, match="image_size=.* or 2 values, each a whole number, 1 to 16384"):
        ImageFolder(root=str(folder), image_size=size)
