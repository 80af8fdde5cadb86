"""What only a GPU can tell: kernels, streams, memory, NCCL; for the rest see test_cuda.py and test_fake_cuda.py.

`pytest -m gpu` runs these and the cases of other tests that have a device.
"""

import os

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist

import panda_lightning as panda
from panda_lightning import KNNIndex
from panda_lightning.formulas import losses
from panda_lightning.formulas.fisher import Estimator
from panda_lightning.networks import augment
from panda_lightning.networks.backbones import Backbone
from panda_lightning.runtime.processes import objects_of_each, of_each
from panda_lightning.search.coreset import greedy_coreset
from panda_lightning.tables.plan import planned
from panda_lightning.tables.rows import Rows
from tests import ranks
from tests.tables.recorded import METHODS, WORDS
from tests.test_cuda import KINDS, images  # noqa: F401  # a fixture
from tests.test_distributed import start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def _float32():
    """Convolutions as a CPU computes them, so that both can be compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def run(detector, folder, out, accelerator, *callbacks, epochs=1, **options):
    data = panda.ImageFolder(
        str(folder), normal_class="spot", image_size=64, batch_size=4, eval_batch_size=4, calibration_fraction=0.0
    )
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=out,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    (trainer.fit if detector.learns else trainer.test)(detector, data)
    return trainer


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"PANDA-OE"}))
def test_scores_are_the_cpus(kind, images, tmp_path):  # noqa: F811
    found = []
    for accelerator in ("cpu", "gpu"):
        pl.seed_everything(0, verbose=False)
        detector = KINDS[kind][0]()
        run(detector, images, tmp_path, accelerator)
        found.append(detector.scores.score)
    # dropout of RotNet draws other numbers there, and an encoder from scratch takes whole steps of rounding
    loose = kind in ("RotNet", "Deep SVDD", "Deep SVDD, soft")
    assert found[1].isfinite().all()
    if not loose:
        torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3 * float(found[0].abs().max()))


class Unhindered(pl.Callback):
    """Nothing waits for the GPU from the end of the second training step to the end of the third."""

    steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx == 1 else "default")
        self.steps += batch_idx == 2

    def on_exception(self, *args):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [name for name, (make, _) in KINDS.items() if make().learns and name != "PANDA-OE"])
def test_a_training_step_does_not_wait_for_it(kind, precision, images, tmp_path):  # noqa: F811
    watch = Unhindered()
    run(KINDS[kind][0](), images, tmp_path, "gpu", watch, precision=precision)
    assert watch.steps == 1


def test_memory_does_not_grow_over_epochs(images, tmp_path):  # noqa: F811
    peaks = []

    class Peak(pl.Callback):
        def on_train_epoch_start(self, *args):
            torch.cuda.synchronize()
            peaks.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
            torch.cuda.reset_peak_memory_stats()

    detector = panda.PANDA("panda_tiny", ewc_weight=100, fisher="ones", grad_clip=1.0)
    run(detector, images, tmp_path, "gpu", Peak(), epochs=6)
    held, peak = zip(*peaks[2:], strict=True)
    assert max(held) - min(held) < 2**20
    assert max(peak) - min(peak) < 2**20


def test_the_old_banks_memory_serves_the_next():
    """The peak is of rows as they come and in order, twice a bank, without the old one and its index beside them."""
    bank = 2**26
    detector = panda.DN2("panda_tiny").to("cuda")

    def make():
        parts = [torch.ones(bank // 2, dtype=torch.uint8, device="cuda") for _ in range(2)]
        detector.bank = torch.cat(parts).view(torch.float32).view(-1, 512)

    def drop():
        detector.index.fit(detector.bank)
        detector.drop_bank()
        return torch.cuda.memory_allocated()

    make()
    empty = drop()  # and cuBLAS has its workspace
    make()
    assert drop() == empty
    torch.cuda.reset_peak_memory_stats()
    make()
    assert torch.cuda.max_memory_allocated() <= empty + 2 * bank + 2**20


def test_batches_are_pinned_and_come_whole(images, tmp_path):  # noqa: F811
    seen = []

    class Look(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            loader = trainer.datamodule.normal_dataloader()
            for batch in loader:
                assert batch["image"].is_pinned()
                torch.cuda._sleep(10**8)  # so that the copy waits
                there = trainer.strategy.batch_to_device(batch)
                seen.append(torch.equal(there["image"].cpu(), batch["image"]))

    run(panda.PANDA("panda_tiny", ewc_weight=0, prefix_cache_gb=0), images, tmp_path, "gpu", Look())
    assert seen
    assert all(seen)


def test_rows_of_a_table_are_the_cpus(study, workdir):
    """They share what is decoded, and the frozen layers' output, which the first of them puts there."""
    cpu = planned(["digits.yaml"], METHODS, ["8", "9"], [0], [*WORDS, "--trainer.accelerator=cpu"])
    found = [[one for _, one in Rows(workdir / name).make(plan)] for name, plan in (("gpu", study), ("cpu", cpu))]
    assert [one.error for some in found for one in some] == [None] * 12
    for there, here in zip(*found, strict=True):
        assert there.auroc == pytest.approx(here.auroc, abs=0.01)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_a_search_comes_behind_what_makes_its_queries(backend):
    generator = torch.Generator().manual_seed(0)
    bank, made = (torch.randn(n, 256, generator=generator) for n in (5000, 200))
    expected = KNNIndex("torch").fit(bank).search(made, 3)
    index, source = KNNIndex(backend).fit(bank.cuda()), made.cuda()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        queries = torch.zeros(200, 256, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**9)  # half a second; then they are written
            queries.copy_(source)
            found = index.search(queries, 3)
        torch.cuda.synchronize()
        torch.testing.assert_close([one.cpu() for one in found], list(expected), rtol=1e-5, atol=0)


def test_maps_are_smoothed_in_full_precision():
    detector = panda.PatchCore("panda_tiny")
    maps = 1000 + torch.rand(2, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = detector._smoothed(maps)
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    torch.testing.assert_close(detector._smoothed(maps.cuda()).cpu(), expected, rtol=1e-6, atol=0)
    with torch.autocast("cuda", torch.float16):
        torch.testing.assert_close(detector._smoothed(maps.cuda()).cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_views_and_losses_are_the_cpus_under_autocast(dtype):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=generator)
    numbers = torch.rand(8, augment.VIEW_DRAWS, generator=generator)
    rows = torch.nn.functional.normalize(torch.randn(2, 40, 64, generator=generator), dim=2)
    torch.backends.cudnn.allow_tf32 = True
    with torch.autocast("cuda", dtype):
        view = augment.random_view(pixels.cuda(), numbers.cuda()).cpu()
        loss = losses.mean_shifted(*rows.cuda(), rows.cuda().mean(dim=(0, 1)))
    difference = (view.int() - augment.random_view(pixels, numbers).int()).abs()
    assert difference.float().mean() < 0.01  # grey levels: of rounding at halves
    torch.testing.assert_close(loss.cpu(), losses.mean_shifted(*rows, rows.mean(dim=(0, 1))), rtol=1e-5, atol=0)


def test_ewc_and_its_gradient_are_the_cpus():
    generator = torch.Generator().manual_seed(0)
    params, start, fisher = (torch.randn(3, 50, generator=generator).abs() for _ in range(3))
    found = []
    for device in ("cpu", "cuda"):
        theta = params.to(device, copy=True).requires_grad_()
        value = losses.ewc([theta], [start.to(device)], [fisher.to(device)])
        value.backward()
        found.append((value.detach().cpu(), theta.grad.cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_the_fisher_diagonal_is_the_cpus():
    found = []
    for device in ("cpu", "cuda"):
        backbone = Backbone.pretrained("panda_tiny").to(device)
        estimator = Estimator(backbone)
        assert estimator._vectorised == (device == "cuda")
        pixels = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        batch = {"image": pixels, "label": torch.zeros(9).long(), "index": torch.arange(9)}
        estimator.add({key: value.to(device) for key, value in batch.items()})
        found.append({name: t.cpu() for name, t in estimator.diagonal().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-2, atol=1e-3 * float(value.max()))


def test_a_coreset_is_as_good_as_the_cpus():
    points = torch.randn(5000, 256, generator=torch.Generator().manual_seed(0))
    far = []
    for there in (points, points.cuda()):
        chosen = points[torch.cat([numbers.cpu() for numbers, _ in greedy_coreset(there, 100)])]
        far.append(float(torch.cdist(points, chosen).amin(dim=1).max()))
    assert far[1] == pytest.approx(far[0], rel=0.05)


def test_a_process_sends_tensors_of_the_cpu_by_nccl(monkeypatch):
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29613")):
        monkeypatch.setenv(name, value)
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        for device in ("cpu", "cuda"):
            found = of_each(torch.arange(3.0, device=device))
            assert (found.tolist(), found.device.type) == ([[0, 1, 2]], device)
        assert objects_of_each((1, "a")) == [(1, "a")]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_gpus_are_one(tmp_path, monkeypatch):
    root = ranks.images(tmp_path)
    cases = ["PANDA, SES", "DN2, sharded", "MSC", "PANDA-OE", "PatchCore", "SPADE", "Deep SVDD, soft", "RotNet"]
    start(root, root / "many", 2, cases, ON_GPU="1")
    (root / "one").mkdir()
    for case in cases:
        ranks.run(root, 1, case, root / "one", {"accelerator": "gpu", "strategy": "auto"})
        one, many = (torch.load(root / f"{name}/{case}.pt", weights_only=True) for name in ("one", "many"))
        tolerance = 1e-6 if case in ranks.FROM_SCRATCH else 1e-3
        scale = float(one["score"].abs().max())
        torch.testing.assert_close(many["score"].cpu(), one["score"].cpu(), rtol=tolerance, atol=tolerance * scale)
    assert "LOCAL_RANK" not in os.environ
