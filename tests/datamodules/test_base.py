import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from panda_lightning import DN2, Digits, ImageFolder, PandaError
from panda_lightning.datamodules.loaders import ShardedSampler
from tests.conftest import make_folder


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
