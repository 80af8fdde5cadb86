"""On a GPU every method gives what it gives on the CPU, and training does not wait for it, as tests/played.py plays it.

What that cannot tell (autocast, kernels, streams, memory) is in tests/test_fake_cuda.py and tests/test_gpu.py.
"""

from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

import panda_lightning as panda
from panda_lightning.search.coreset import greedy_coreset
from panda_lightning.search.knn import KNNIndex
from tests.conftest import make_clouds, make_folder
from tests.played import OnGPU, machine

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_device_is_as_strict_as_the_real_one_and_counts_what_waits():
    with machine("cuda:0") as (gpu, _):
        there = torch.arange(4.0).to("cuda:0", non_blocking=True)
        assert (there.is_cuda, there.double().dtype) == (True, torch.float64)
        with pytest.raises(RuntimeError, match="found cuda and cpu"):
            there + torch.ones(4)
        flags, place = there > 1, torch.tensor([1])
        there[flags] = 0  # a mask that is filled
        there[place.to("cuda:0", non_blocking=True)], there.clone()[1:], torch.where(flags, there, 0)
        assert not gpu.waits
        for work in (
            lambda: there[flags],
            lambda: there[place],
            lambda: there[[0, 1]],
            lambda: float(there[0]),
            lambda: bool(flags.any()),
            lambda: there.cpu(),
            lambda: there.to("cpu", non_blocking=True),
            lambda: place.to("cuda"),
            lambda: there.new_tensor([1.0]),
            lambda: torch.tensor([1.0], device="cuda:0"),
            lambda: flags.nonzero(),
            lambda: there.tolist(),
        ):
            gpu.waits.clear()
            work()
            assert len(gpu.waits) == 1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = make_folder(tmp_path_factory.mktemp("cuda") / "images", train=24)
    for n in range(6):
        path = root / f"ground_truth/stripe/{n:03d}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.new("L", (40, 40))
        mask.paste(255, (3 * n, 5, 3 * n + 10, 25))
        mask.save(path)
    return root


ONE = {"nonzero": 1, "__int__": 1}  # search: how many candidates there are, and how many a query has at most
# name -> the detector, and how often a process waits in a batch that is scored; in one of training, and in one of
# extraction, it never does, but for PatchCore
KINDS = {
    "DN2": (lambda: panda.DN2("panda_tiny"), ONE),
    "DN2, bank in parts": (lambda: panda.DN2("panda_tiny", shard_bank=True), ONE),
    "PANDA": (lambda: panda.PANDA("panda_tiny", ewc_weight=0, grad_clip=1.0), ONE),
    "PANDA, no cache": (lambda: panda.PANDA("panda_tiny", ewc_weight=0, prefix_cache_gb=0), ONE),
    "MSC": (lambda: panda.MSC("panda_tiny"), ONE),
    "MSC, angular": (lambda: panda.MSC("panda_tiny", angular=True, lr=0.1), ONE),
    "PANDA-OE": (lambda: panda.PANDAOE("panda_tiny"), {}),
    "Deep SVDD": (lambda: panda.DeepSVDD(), {}),
    "Deep SVDD, soft": (lambda: panda.DeepSVDD(boundary="soft", pretrain_epochs=0, warm_up=0), {}),
    "RotNet": (lambda: panda.MultiHeadRotNet(depth=10, width=1), {}),
    "OC-SVM": (lambda: panda.OCSVM("panda_tiny", inputs="backbone"), {}),
    # of maps, masks and whether these are known, whose pixels are counted on the CPU; of two searches
    "PatchCore": (lambda: panda.PatchCore("panda_tiny"), {"cpu": 3, "nonzero": 2, "__int__": 2}),
    "PatchCore, tiles": (lambda: panda.PatchCore("panda_tiny", tile=32), {"cpu": 3, "nonzero": 2, "__int__": 2}),
    # those of searches are left out: one for images, and one an image and level for patches
    "SPADE": (lambda: panda.SPADE("panda_tiny", k=3), {"cpu": 3}),
}


class Waits(pl.Callback):
    """What waited in each batch, from its beginning to that of the next."""

    def __init__(self, gpu):
        self.gpu, self.marks = gpu, {"train": [], "score": [], "extract": []}

    def mark(self, phase):
        self.marks[phase].append(len(self.gpu.waits))

    def setup(self, trainer, pl_module, stage):
        """Extraction is what passes ``embed`` when there is no bank."""
        embed = getattr(pl_module, "embed", None)

        def marked(batch):
            if pl_module.has_bank and pl_module.bank is None and len(batch["image"]) > 1:
                self.mark("extract")
            return embed(batch)

        pl_module.embed = marked

    def on_train_batch_start(self, *args):
        self.mark("train")

    def on_validation_batch_start(self, *args):
        self.mark("score")

    on_test_batch_start = on_validation_batch_start

    def each(self, phase):
        """Of the second batch; Health looks at the loss after the first one of an epoch."""
        marks = self.marks[phase]
        return Counter(self.gpu.waits[marks[1] : marks[2]]) if len(marks) > 2 else None


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_gives_the_same_scores_and_waits_no_more_than_said(kind, images, tmp_path):
    make, while_scoring = KINDS[kind]
    side, others = (64 if "tiles" in kind else 32), None
    if kind == "PANDA-OE":
        others = str(make_clouds(tmp_path / "others", 30))

    def run(where, *callbacks):
        pl.seed_everything(0, verbose=False)
        detector = make()
        if getattr(detector, "backbone", None) is not None:
            detector.backbone.compute("plain")  # folding takes another way on a GPU
        data = panda.ImageFolder(
            str(images),
            normal_class="spot",
            image_size=side,
            batch_size=4,
            eval_batch_size=4,
            outliers=others,
        )
        trainer = pl.Trainer(
            max_epochs=1, enable_progress_bar=False, enable_model_summary=False, logger=False, num_sanity_val_steps=0,
            enable_checkpointing=False, default_root_dir=tmp_path, callbacks=list(callbacks), **where,
        )  # fmt: skip
        (trainer.fit if detector.learns else trainer.test)(detector, data)
        return detector, {k: float(v) for k, v in trainer.callback_metrics.items() if "seconds" not in k}

    detector, numbers = run({"accelerator": "cpu"})
    with machine("cuda:0") as (gpu, where):
        waits = Waits(gpu)
        there, found = run(where, waits)
        assert "nan" not in str(found)
        assert waits.each("train") == (Counter() if there.learns else None)
        if there.has_bank and kind != "SPADE":  # PatchCore reads which images a batch has
            assert waits.each("extract") == Counter({"tolist": 1} if "PatchCore" in kind else {})
        scoring = waits.each("score")
        assert {k: n for k, n in scoring.items() if kind != "SPADE" or k not in ONE} == while_scoring
    torch.testing.assert_close(there.scores.score, detector.scores.score, rtol=1e-5, atol=1e-6)
    assert found == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert len(numbers) > 1


@pytest.mark.parametrize("size", [100, 20_000])  # 20,000: by groups of rows
def test_a_search_waits_twice(size):
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(size, 8, generator=generator), torch.randn(30, 8, generator=generator)
    expected = KNNIndex("torch").fit(bank).search(queries, 5)
    with machine("cuda:0") as (gpu, _):
        index = KNNIndex("torch").fit(bank.to("cuda:0"))
        there = queries.to("cuda:0")
        gpu.waits.clear()
        found = index.search(there, 5)
        assert Counter(gpu.waits) == ONE
        assert all(isinstance(one, OnGPU) for one in found)
        torch.testing.assert_close([one.cpu() for one in found], list(expected), rtol=0, atol=0)


def test_a_coreset_is_the_same_and_waits_for_many_choices_at_once():
    points = torch.randn(6000, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([rows for rows, _ in greedy_coreset(points, 1000)])
    with machine("cuda:0") as (gpu, _):
        found = [rows.cpu() for rows, _ in greedy_coreset(points.to("cuda:0"), 1000)]
        assert len(gpu.waits) < 700  # 100 of them for what is yielded, others for looks at all points
    assert torch.equal(torch.cat(found), expected)


def test_a_checkpoints_bank_in_parts_lies_where_it_can_be_sent_from():
    detector = panda.DN2("panda_tiny", shard_bank=True)
    detector.bank = torch.randn(5, 6)  # as it comes out of a checkpoint
    with machine("cuda:0"):
        detector.to("cuda:0")
        detector.fit_index()
        assert detector.bank.is_cuda
