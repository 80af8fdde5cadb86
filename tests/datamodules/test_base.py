import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from panda_lightning import DN2, Digits, ImageFolder, PandaError
from panda_lightning.datamodules.base import View
from panda_lightning.datamodules.loaders import ShardedSampler
from tests.conftest import make_folder, picture


def labels(data):
    return torch.cat([batch["label"] for batch in data.val_dataloader()])


def test_one_vs_rest_and_leave_one_out():
    data = Digits(normal_class=3, image_size=8, crop="squash")
    data.setup("fit")
    targets = data.read("test").targets
    assert set(data.normal_images.targets) == {3}
    np.testing.assert_array_equal(labels(data), targets != 3)
    reverse = Digits(normal_class="3", protocol="leave_one_out", image_size=8, crop="squash")
    reverse.setup("fit")
    assert set(reverse.normal_images.targets) == set(range(10)) - {3}
    np.testing.assert_array_equal(labels(reverse), targets == 3)


def test_loaders_give_every_index_once_and_in_order():
    data = Digits(normal_class=0, image_size=8, crop="squash", batch_size=32, eval_batch_size=100)
    data.setup("fit")
    for loader, size in ((data.normal_dataloader(), 90), (data.val_dataloader(), 898)):
        batches = list(loader)
        assert torch.equal(torch.cat([b["index"] for b in batches]), torch.arange(size))
        assert batches[0]["image"].dtype == torch.uint8
        assert batches[0]["image"].shape[1:] == (3, 8, 8)
    train = torch.cat([b["index"] for b in data.train_dataloader()])
    assert not torch.equal(train, torch.arange(90))
    assert torch.equal(train.sort().values, torch.arange(90))


def test_limits_are_evenly_spaced():
    data = Digits(normal_class=0, train_limit=10, test_limit=50)
    data.setup("fit")
    assert (len(data.normal_images), len(data.test_images)) == (10, 50)
    assert len(set(data.test_images.targets)) == 10


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 6, 11])
def test_sampler_deals_one_order_to_any_number_of_processes(world, size):
    shares = [ShardedSampler(size, world, rank, shuffle=False) for rank in range(world)]
    rows = [list(s) for s in shares]
    assert [len(r) for r in rows] == [len(s) for s in shares]
    assert sorted(i for r in rows for i in r) == list(range(size))

    alone = list(ShardedSampler(size, 1, 0, shuffle=True, seed=5))
    shares = [ShardedSampler(size, world, rank, shuffle=True, seed=5) for rank in range(world)]
    rows = [list(s) for s in shares]
    assert {len(r) for r in rows} == {len(shares[0])} == {-(-size // world)}
    dealt = [i for step in zip(*rows, strict=True) for i in step]
    assert [i for i in dealt if i >= 0] == alone
    assert len(dealt) - size < world


def test_every_epoch_has_its_own_order():
    sampler = ShardedSampler(20, 1, 0, shuffle=True)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]


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


def test_interpolation_is_the_networks_own(folder, workdir):
    def pixels(**options):
        data = ImageFolder(root=str(folder), normal_class="spot", image_size=32, **options)
        alone = next(iter(data.test_dataloader()))["image"]  # before the run: this fixes nothing
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.test(DN2("panda_tiny"), data, verbose=False)
        return alone, next(iter(data.test_dataloader()))["image"]

    (bilinear, own), (bicubic, _) = pixels(), pixels(interpolation="bicubic")
    assert torch.equal(own, bicubic)
    assert not torch.equal(bilinear, bicubic)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normal_class": 12}, r"normal_class=12 is not a class of Digits \(0-9: 0, 1, 2"),
        ({"normal_class": "zero"}, "normal_class=zero is not a class of Digits"),
        ({"normal_class": None}, "normal_class=None is not a class of Digits"),
        ({"normal_class": 0, "train_limit": 1}, "a single training image of the normal class 0: give 2 or more"),
        ({"normal_class": 0, "test_limit": 1}, "are all anomalous with normal class 0: AUROC needs both kinds"),
    ],
)
def test_what_cannot_work_is_said_in_setup(options, words):
    with pytest.raises(PandaError, match=words):
        Digits(**options).setup("fit")


def test_a_batch_is_shared_by_the_processes_of_a_fit_alone(monkeypatch):
    monkeypatch.setattr(Digits, "_world", 3)
    data = Digits(normal_class=0, batch_size=32)
    data.setup("test")
    with pytest.raises(PandaError, match="batch_size=32 is shared by 3 processes: choose a multiple of 3"):
        data.setup("fit")


def test_a_resize_below_the_crop_is_refused():
    with pytest.raises(PandaError, match="resize=100 is smaller than image_size=224"):
        Digits(normal_class=0, resize=100).setup("fit")


def test_a_split_of_ours_is_kept_with_the_run(tmp_path):
    from panda_lightning import CatsVsDogs
    from tests.datamodules.official import make_cats_vs_dogs

    make_cats_vs_dogs(tmp_path / "data")
    logger = pl.loggers.CSVLogger(tmp_path, name="run", version=0)
    trainer = pl.Trainer(accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False)
    data = CatsVsDogs(root=str(tmp_path / "data"), normal_class="cat", image_size=32)
    trainer.test(DN2("panda_tiny"), data, verbose=False)
    lines = (tmp_path / "run/version_0/manifest.csv").read_text().splitlines()
    assert lines[0] == "file,split,label"
    assert lines[1] == "PetImages/Cat/10000.jpg,test,0"
    assert len(lines) == 1 + 6 + 8


def test_another_root_may_be_put_in_its_place(folder, tmp_path):
    data = ImageFolder(root=str(folder))
    assert len(data.test_images) == 13
    data.root = str(make_folder(tmp_path / "elsewhere", train=3, normal=2, anomalous=1))
    assert (len(data.normal_images), len(data.test_images)) == (3, 3)
    assert data.names(data.test_images) == ["test/spot/100.png", "test/spot/101.png", "test/stripe/000.png"]
