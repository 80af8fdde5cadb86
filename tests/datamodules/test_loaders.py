import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from panda_lightning import ImageFolder
from panda_lightning.datamodules.loaders import PinningLoader, ResumableLoader, ShardedSampler
from panda_lightning.pictures.images import GAP, as_is
from panda_lightning.pictures.loose import LooseDataset, pointed_at
from tests import copies


class Rows(Dataset):
    """Row i is i, fillers included."""

    def __len__(self):
        return 11

    def __getitem__(self, row):
        return row


def loader(world=1, rank=0, batch_size=2):
    return ResumableLoader(Rows(), batch_size=batch_size, sampler=ShardedSampler(11, world, rank, shuffle=True, seed=3))


def drawn(batches):
    return [torch.as_tensor(batch).tolist() for batch in batches]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_rows_are_dealt_like_cards(size, world):
    orders = {True: list(ShardedSampler(size, 1, 0, shuffle=True, seed=5)), False: list(range(size))}
    for shuffle, order in orders.items():
        hands = [[] for _ in range(world)]
        for place, row in enumerate(order):
            hands[place % world].append(row)
        if shuffle:
            for hand in hands:
                hand += [-1] * (len(hands[0]) - len(hand))
        samplers = [ShardedSampler(size, world, rank, shuffle, seed=5) for rank in range(world)]
        assert [list(sampler) for sampler in samplers] == hands
        assert [len(sampler) for sampler in samplers] == [len(hand) for hand in hands]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_million_rows_are_no_million_numbers(shuffle):
    tracemalloc.start()
    rows = iter(ShardedSampler(1_000_000, 2, 1, shuffle))
    first = [next(rows) for _ in range(5000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(first)) == 5000
    assert peak < 2**20  # bytes beside the tensor of the order, which takes 8 a row
    assert len(first) + sum(1 for _ in rows) == 500_000


def test_no_two_epochs_of_any_two_seeds_have_one_order():
    orders = []
    for seed in range(5):
        sampler = ShardedSampler(30, 1, 0, shuffle=True, seed=seed)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            orders.append(tuple(sampler))
    assert len(set(orders)) == 25
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert tuple(ShardedSampler(30, 1, 0, shuffle=True)) == orders[0]  # seed 0, epoch 0


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 3), (7, 0), (7, 3)])
def test_an_epoch_has_the_order_that_it_had_in_earlier_versions(seed, epoch):
    """A checkpoint of the middle of an epoch names a place in it; with another order images would come twice."""
    sampler = ShardedSampler(30, 1, 0, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    assert list(sampler) == torch.randperm(30, generator=generator).tolist()


@pytest.mark.parametrize(("world", "rank", "batch_size"), [(1, 0, 2), (1, 0, 3), (2, 0, 2), (2, 1, 2), (3, 2, None)])
def test_a_loader_goes_on_where_another_stopped(world, rank, batch_size):
    whole = loader(world, rank, batch_size)
    whole.sampler.set_epoch(4)
    expected = drawn(whole)
    for done in range(len(expected)):
        part, rest = loader(world, rank, batch_size), loader(world, rank, batch_size)
        part.sampler.set_epoch(4)
        batches = iter(part)
        seen = drawn(next(batches) for _ in range(done))
        state = part.state_dict()
        assert state == {"epoch": 4, "done": done}
        rest.load_state_dict(state)
        rest.sampler.set_epoch(4)
        for number, batch in enumerate(rest, done + 1):
            assert rest.state_dict() == {"epoch": 4, "done": number}
            seen += drawn([batch])
        assert seen == expected


def test_a_place_counts_once_and_in_its_epoch_alone():
    expected = {}
    for epoch in (1, 2):
        plain = loader()
        plain.sampler.set_epoch(epoch)
        expected[epoch] = drawn(plain)
    resumed = loader()
    resumed.load_state_dict({"epoch": 1, "done": 4})
    for epoch, rest in ((1, expected[1][4:]), (1, expected[1]), (2, expected[2])):
        resumed.sampler.set_epoch(epoch)
        assert drawn(resumed) == rest
    elsewhere = loader()
    elsewhere.load_state_dict({"epoch": 1, "done": 4})
    elsewhere.sampler.set_epoch(2)
    assert drawn(elsewhere) == expected[2]
    elsewhere.sampler.set_epoch(1)
    assert drawn(elsewhere) == expected[1]


@pytest.mark.parametrize("batch_idx", [-1, 0, 3, 4, 5, 6, 12])  # 5 and 11 are the last of the loader
def test_the_runs_own_count_of_batches_is_what_counts(batch_idx):
    """It goes on beyond a loader's length where the loader goes round and round beside a longer one."""
    expected, resumed = drawn(loader()), loader()
    resumed.load_state_dict({"epoch": 0, "done": 2})
    resumed.loop = SimpleNamespace(batch_idx=batch_idx)
    assert drawn(resumed) == expected[(batch_idx + 1) % 6 :]


def test_after_an_epochs_last_batch_comes_its_first():
    """So it is where a loader goes round and round beside a longer one."""
    full, again = loader(), loader()
    expected = drawn(full)
    assert full.state_dict() == {"epoch": 0, "done": len(full)}
    again.load_state_dict(full.state_dict())
    assert drawn(again) == expected


def test_the_epoch_may_be_set_after_the_iterator_was_made():
    late, early = loader(), loader()
    batches = iter(late)
    for one in (late, early):
        one.sampler.set_epoch(7)
    assert drawn(batches) == drawn(early) != drawn(loader())
    assert loader().state_dict() == {"epoch": 0, "done": 0}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("kind", [PinningLoader, ResumableLoader])
def test_what_went_to_the_gpu_after_an_iterator_was_made_is_not_pinned(kind):
    dataset = Rows()
    made = kind(dataset, sampler=ShardedSampler(11, 1, 0, shuffle=False), pin_memory=True)
    for where, pinned in ((None, True), ("cpu", True), ("cuda", False)):
        batches = iter(made)
        dataset.hidden = where and SimpleNamespace(is_cuda=where == "cuda")
        assert len(drawn(batches)) == 11
        assert made.pin_memory == pinned


KINDS = torch.tensor([0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_step_of_all_processes_has_images_of_one_size(world, shuffle):
    def steps(world, epoch):
        samplers = [ShardedSampler(11, world, rank, shuffle, 3, KINDS, 4 // world) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        hands = [list(sampler) for sampler in samplers]
        assert {len(hand) for hand in hands} == {len(sampler) for sampler in samplers}
        whole = [torch.tensor(hand).view(-1, 4 // world) for hand in hands]
        return torch.stack(whole, dim=2).flatten(1)  # a step's rows of all processes, as they were dealt

    orders = [steps(world, epoch) for epoch in range(4)]
    for epoch, order in enumerate(orders):
        assert sorted(order[order >= 0].tolist()) == list(range(11))
        for step in order:
            assert len(set(KINDS[step[step >= 0]].tolist())) == 1
            rows = (step != GAP).view(-1, world)
            assert (rows.all(dim=1) | ~rows.any(dim=1)).all()  # every process has as many rows
        alone = steps(1, epoch)
        assert torch.equal(torch.where(order < 0, -1, order), torch.where(alone < 0, -1, alone))
    assert (len({str(order.tolist()) for order in orders}) == 4) == shuffle


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
def test_a_loader_of_several_sizes_goes_on_where_another_stopped(world, rank):
    def make():
        sampler = ShardedSampler(11, world, rank, shuffle=True, seed=3, kinds=KINDS, batch=4 // world)
        found = ResumableLoader(Rows(), batch_size=4 // world, sampler=sampler)
        sampler.set_epoch(2)
        return found

    expected = drawn(make())
    assert len(expected) == len(make()) == 4
    for done in range(4):
        rest = make()
        rest.load_state_dict({"epoch": 2, "done": done})
        assert drawn(rest) == expected[done:]


@pytest.mark.parametrize("world", [1, 3])
def test_of_no_images_each_process_gets_one_filler(world):
    for rank in range(world):
        sampler = ShardedSampler(0, world, rank, shuffle=False)
        assert list(sampler) == [-1]
        assert len(sampler) == 1


@pytest.fixture
def from_disk(folder, tmp_path):
    """Loaders whose images stay on disk, by name; each call makes new ones."""
    np.save(tmp_path / "clouds.npy", np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    for file in sorted((folder / "test/stripe").iterdir()):
        mask = folder / f"ground_truth/stripe/{file.stem}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40), 255).save(mask)

    def make(workers):
        data = ImageFolder(
            str(folder), normal_class="spot", image_size=32, batch_size=4, eval_batch_size=4, memory_gb=0,
            num_workers=workers, outliers=str(tmp_path / "clouds.npy"),
        )  # fmt: skip
        loose = LooseDataset(pointed_at(folder / "test"), data.view, threads=not workers)
        combined = data.train_dataloader()
        return combined.iterables | {
            "test": data.test_dataloader(),
            "loose": DataLoader(loose, batch_size=4, collate_fn=as_is, num_workers=workers),
        }

    return make


@pytest.mark.parametrize("name", ["normal", "outlier", "test", "loose"])
def test_workers_that_are_started_anew_give_the_same_batches(from_disk, name):
    wanted, spawned = list(from_disk(0)[name]), from_disk(1)[name]
    spawned.multiprocessing_context = copies.CONTEXT  # which inherits as little as spawn, the only way on Windows
    found = list(spawned)
    assert len(found) == len(wanted) >= 3
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(one[key], value) if isinstance(value, torch.Tensor) else one[key] == value
    assert ("mask" in found[-1]) == (name == "test")
