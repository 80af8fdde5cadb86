import errno
import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import TQDMProgressBar
from rich.console import Console
from torch.nn.functional import conv2d
from torch.utils.data import DataLoader

from panda_lightning import PandaError
from panda_lightning.datamodules.loaders import ShardedSampler
from panda_lightning.networks import prefix_cache
from panda_lightning.networks.prefix_cache import cache_prefix
from panda_lightning.pictures.images import Decoded, ImageDataset, Images, as_is
from panda_lightning.pictures.view import View
from panda_lightning.runtime import whole

WEIGHT = torch.randint(-1, 2, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()


class Layer:
    """Stands for a network: one frozen layer, whose sums of whole numbers are exact; it counts the images it sees."""

    architecture, splits, pool = "layer", True, None

    def __init__(self, weight=WEIGHT, optimize="plain"):
        self.weight, self.optimize, self.seen = weight, optimize, 0

    def prefix(self, images):
        self.seen += len(images)
        return conv2d(images.float(), self.weight, stride=4)


@pytest.fixture(autouse=True)
def _made_of(monkeypatch):
    def made_of(layer, frozen=False):
        return {"weight": layer.weight} if frozen else pytest.fail("adapted weights do not matter")

    monkeypatch.setattr(prefix_cache, "made_of", made_of)


class Wide(Layer):
    """So many values of each image, which take no memory until they are kept."""

    def prefix(self, images):
        return torch.zeros(1).expand(len(images), self.weight)


def dataset(count, seed=0):
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    images = Images(pixels.permute(0, 2, 3, 1).numpy(), np.zeros(count, dtype=np.int64))
    return ImageDataset(Decoded(images, np.arange(count), pixels), images.targets, View(8, "squash", 8, "bilinear"))


def by_hand(images, dtype=torch.float32):
    """What the layer makes of each image, window by window."""
    found = torch.empty(len(images), 2, 2, 2)
    for image, out in zip(images.pixels.float(), found, strict=True):
        for channel, y, x in np.ndindex(2, 2, 2):
            out[channel, y, x] = (image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] * WEIGHT[channel]).sum()
    return found.to(dtype)


def trainer(precision="32-true", world=1, rank=0, local_rank=0, **options):
    """A process of several that ``as_processes`` lets meet, or the only one."""

    def exchange(thing):
        parts = [thing] * world
        if world > 1:
            dist.all_gather_object(parts, thing)
        return parts

    made = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, precision=precision,
        **{"enable_progress_bar": False, **options},
    )  # fmt: skip
    made.strategy.world_size, made.strategy.global_rank, made.strategy.local_rank = world, rank, local_rank
    made.strategy.reduce_boolean_decision = lambda decision: all(exchange(decision))
    made.strategy.barrier = lambda: exchange(None)
    return made


def cache(images, layer=None, budget=10**6, half=False, folder=None, run=None, batch_size=4):
    """Bytes taken, for this process's share of the images."""
    run = run or trainer()
    sampler = ShardedSampler(len(images), run.world_size, run.strategy.global_rank, shuffle=False)
    loader = DataLoader(images, batch_size=batch_size, sampler=sampler, collate_fn=as_is)
    return cache_prefix(run, layer or Layer(), loader, budget, half, folder and str(folder))


def test_what_cannot_be_computed_in_two_parts_is_not_kept_and_says_so_once(caplog):
    shown, layer = dataset(3), Layer()
    layer.splits = False
    with caplog.at_level("INFO"):
        assert [cache(shown, layer), cache(shown, layer)] == [0, 0]
    assert shown.hidden is None
    assert layer.seen == 0
    assert caplog.text.count("layer cannot be computed in two parts, so its frozen layers are not cached") == 1


@pytest.mark.parametrize(
    ("half", "precision", "dtype"),
    [
        (False, "32-true", torch.float32),
        (True, "32-true", torch.float16),
        (False, "bf16-mixed", torch.bfloat16),
        (True, "bf16-mixed", torch.float16),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_batches_show_what_the_frozen_layers_made_of_each_image(tmp_path, count, on_disk, half, precision, dtype):
    images, layer = dataset(count), Layer()
    expected = by_hand(images)
    if precision == "bf16-mixed":
        expected = expected.to(torch.bfloat16)
    taken = cache(images, layer, half=half, folder=tmp_path / "a/b" if on_disk else None, run=trainer(precision))
    assert taken == (0 if on_disk else count * 8 * dtype.itemsize)
    assert layer.seen == count + 1  # and one to learn the size
    assert images.hidden.dtype == dtype
    assert torch.equal(images.hidden, expected.to(dtype))
    for rows in ([count - 1, 0], [0, -1], list(range(count))):
        assert torch.equal(images.__getitems__(rows)["image"], expected.to(dtype)[[max(row, 0) for row in rows]])


@pytest.mark.parametrize("batch_size", [1, 3, 100, None])
def test_batches_may_have_any_size(batch_size):
    images, layer = dataset(7), Layer()
    cache(images, layer, batch_size=batch_size)
    assert layer.seen == 8
    assert torch.equal(images.hidden, by_hand(images))


@pytest.mark.parametrize(("world", "count"), [(2, 9), (3, 2), (3, 13)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_processes_share_the_work_and_each_has_all(tmp_path, as_processes, world, count, on_disk):
    shown, layers = [dataset(count) for _ in range(world)], [Layer() for _ in range(world)]
    runs = [trainer(world=world, rank=rank, local_rank=rank) for rank in range(world)]
    folder = tmp_path if on_disk else None
    taken = as_processes(world, lambda rank: cache(shown[rank], layers[rank], folder=folder, run=runs[rank]))
    assert taken == [0 if on_disk else count * 32] * world
    assert [layer.seen for layer in layers] == [1 + len(range(rank, count, world)) for rank in range(world)]
    for images in shown:
        assert torch.equal(images.hidden, by_hand(images))
    if on_disk:
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [count * 32]


def test_a_machine_that_has_the_file_helps_one_that_has_not(tmp_path, as_processes):
    folders, shown = [tmp_path / "0", tmp_path / "1"], [dataset(9), dataset(9)]
    cache(dataset(9), folder=folders[1])
    runs = [trainer(world=2, rank=rank) for rank in range(2)]
    as_processes(2, lambda rank: cache(shown[rank], folder=folders[rank], run=runs[rank]))
    for images, folder in zip(shown, folders, strict=True):
        assert torch.equal(images.hidden, by_hand(images))
        assert len(list(folder.iterdir())) == 1


def test_where_one_process_lacks_room_all_step_aside(as_processes):
    shown, runs = [dataset(9), dataset(9)], [trainer(world=2, rank=rank) for rank in range(2)]
    assert as_processes(2, lambda rank: cache(shown[rank], budget=288 - rank, run=runs[rank])) == [0, 0]
    assert [images.hidden for images in shown] == [None, None]


@pytest.mark.parametrize(("half", "needed"), [(False, 288), (True, 144)])
def test_what_just_fits_is_kept(half, needed):
    images = dataset(9)
    assert cache(images, budget=needed - 1, half=half) == 0
    assert images.hidden is None
    assert cache(images, budget=needed, half=half) == needed
    assert torch.equal(images.hidden, by_hand(images).to(torch.float16 if half else torch.float32))


def test_a_file_is_found_again_by_the_same_images_and_layers_only(tmp_path):
    def seen(images=None, run=None, half=False, **network):
        layer = Layer(**network)
        cache(images or dataset(9), layer, half=half, folder=tmp_path, run=run, budget=0)  # which does not count
        return layer.seen, len(list(tmp_path.iterdir()))

    assert seen() == (10, 1)
    assert seen() == (1, 1)  # the one to learn the size
    assert seen(weight=WEIGHT + 1) == (10, 2)
    assert seen(optimize="folded") == (10, 3)
    assert seen(images=dataset(9, seed=1)) == (10, 4)
    assert seen(run=trainer("bf16-mixed"), half=True) == (10, 5)
    assert seen(half=True) == (10, 6)
    assert seen() == (1, 6)


def test_a_file_is_read_whole_or_made_again_and_never_changed(tmp_path):
    cache(dataset(9), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    for content, passes in ((path.read_bytes(), 1), (path.read_bytes()[:-1], 10), (path.read_bytes() + b"\0", 10)):
        path.write_bytes(content)
        images, layer = dataset(9), Layer()
        cache(images, layer, folder=tmp_path)
        assert layer.seen == passes
        assert torch.equal(images.hidden, by_hand(images))
        images.hidden.zero_()
        assert path.read_bytes() == by_hand(images).numpy().tobytes()


def test_work_that_is_broken_off_leaves_no_file(tmp_path):
    class Broken(Layer):
        def prefix(self, images):
            if self.seen > 4:
                raise KeyboardInterrupt
            return super().prefix(images)

    images = dataset(9)
    with pytest.raises(KeyboardInterrupt):
        cache(images, Broken(), folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert images.hidden is None


def test_the_disks_space_is_taken_before_the_images_pass(tmp_path, monkeypatch):
    def full(path, size):
        raise OSError(errno.ENOSPC, f"no space for {size} bytes")

    monkeypatch.setattr(whole, "take_space", full)
    layer = Layer()
    with pytest.raises(OSError, match="no space for 288 bytes"):
        cache(dataset(9), layer, folder=tmp_path)
    assert layer.seen == 1  # the one to learn the size


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_too_large_says_how_much_it_is(tmp_path, monkeypatch, caplog, on_disk):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    images = dataset(3)
    with caplog.at_level("INFO"):
        assert cache(images, Wide(2**27), budget=2**29, folder=tmp_path if on_disk else None) == 0
    limit = "is free in prefix_cache_dir" if on_disk else "is left in prefix_cache_gb"
    assert f"output of 3 images would take 1.5 GiB, more than {limit} (512.0 MiB): these images pass" in caplog.text
    assert images.hidden is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_kept_says_how_much_it_is_and_where(tmp_path, monkeypatch, caplog, on_disk):
    for full in (False, True)[: 1 + on_disk]:  # a disk that is full holds what it holds
        if full:
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
        caplog.clear()
        with caplog.at_level("INFO"):
            cache(dataset(2), Wide(2**18), budget=2**21, folder=tmp_path if on_disk else None)
        place = f"in {next(tmp_path.iterdir())}" if on_disk else "on cpu"
        assert f"output of 2 images is cached: 2.0 MiB {place}." in caplog.text


def test_a_bar_shows_what_is_done_and_how_far_it_is(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    cache(dataset(9), run=trainer(enable_progress_bar=True, callbacks=[TQDMProgressBar()]))
    assert "Frozen layers, once" in console.file.getvalue()
    assert "67%" in console.file.getvalue()  # two batches of three


@pytest.mark.parametrize("on_disk", [False, True])
def test_values_that_float16_cannot_hold_are_said_and_nothing_is_kept(tmp_path, on_disk):
    images, layer = dataset(3), Layer(300 * WEIGHT)
    folder = tmp_path if on_disk else None
    with pytest.raises(PandaError, match=r"values up to \d.*float16 ends at 65504: leave prefix_cache_half out"):
        cache(images, layer, half=True, folder=folder)
    assert images.hidden is None
    assert not list(tmp_path.glob("*"))
    assert cache(images, layer, folder=folder) == (0 if on_disk else 3 * 8 * 4)
