"""On Apple's GPU, which has no float64, every method gives what it gives on the CPU."""

from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import timm
import torch

import panda_lightning as panda
from panda_lightning.callbacks.feature_health import FeatureHealth
from panda_lightning.formulas import feature_health, metrics
from panda_lightning.formulas.fisher import Estimator
from panda_lightning.networks.backbones import Backbone
from panda_lightning.pictures.view import View
from panda_lightning.search.knn import KNNIndex
from tests.played import OnGPU, apple

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_device_is_as_strict_as_the_real_one():
    one = torch.ones(2)
    with apple():
        there = one.to("mps")
        assert there.device.type == "mps"
        for wrong in (
            lambda: there.double(),
            lambda: there.sum(dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: one.double().to(there.device),
            lambda: there.to(one.double()).to("mps"),
        ):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(RuntimeError, match="found mps and cpu"):
            there + one
        assert isinstance((there * 2).cpu(), torch.Tensor)
        assert not isinstance((there * 2).cpu(), OnGPU)


@pytest.mark.parametrize("size", [100, 20_000])  # 20,000: by groups of rows
def test_the_search_is_the_same_and_searches_again_where_it_must(size):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(size, 8, generator=generator)
    bank[::2] += 10_000  # so that candidates by products are wrong
    queries = torch.randn(50, 8, generator=generator)
    distance, row = KNNIndex("torch").fit(bank).search(queries, 5)
    with apple():
        found = KNNIndex("torch").fit(bank.to("mps")).search(queries.to("mps"), 5)
        assert {t.device.type for t in found} == {"mps"}
        found = [t.cpu() for t in found]
    torch.testing.assert_close(found, [distance, row], rtol=0, atol=0)


def test_formulas_are_the_same():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(40) % 3 == 0).long()
    wanted = feature_health.effective_rank(x), feature_health.variance(x), metrics.auroc(x[:, 0], labels)
    with apple():
        there = x.to("mps")
        found = feature_health.effective_rank(there), feature_health.variance(there)
        assert (*found, metrics.auroc(there[:, 0], labels.to("mps"))) == wanted


def test_a_view_is_undone_there():
    view, values = View((20, 30), "center", 24, "bilinear"), torch.rand(20, 30)
    expected = view.undone(values, (50, 41))
    with apple():
        torch.testing.assert_close(view.undone(values.to("mps"), (50, 41)).cpu(), expected, equal_nan=True)


def test_the_fisher_diagonal_counts_images_where_it_can():
    backbone = Backbone(timm.create_model("resnet18", num_classes=6), 1)
    with apple():
        estimator = Estimator(backbone.to("mps"))
        assert {t.device.type for t in estimator.total.values()} == {"mps"}
        assert estimator.count.dtype == torch.float64


KINDS = {
    "DN2": lambda: panda.DN2("panda_tiny"),
    "DN2, bank in parts": lambda: panda.DN2("panda_tiny", shard_bank=True),
    "PANDA": lambda: panda.PANDA("panda_tiny", ewc_weight=0, grad_clip=1.0),
    "MSC": lambda: panda.MSC("panda_tiny"),
    "Deep SVDD": lambda: panda.DeepSVDD(),
    "OC-SVM": lambda: panda.OCSVM("panda_tiny", inputs="backbone"),
    "PatchCore": lambda: panda.PatchCore("panda_tiny"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_gives_the_same_scores(kind, folder, tmp_path):
    found = []
    for place in ("cpu", "mps"):
        pl.seed_everything(0, verbose=False)
        detector = KINDS[kind]()
        if getattr(detector, "backbone", None) is not None:
            detector.backbone.compute("plain")  # folding takes another way on a GPU
        data = panda.ImageFolder(
            str(folder),
            normal_class="spot",
            image_size=32,
            batch_size=4,
            calibration_fraction=0.3 if detector.learns else 0.0,
        )
        with apple() if place == "mps" else nullcontext({"accelerator": "cpu"}) as where:
            trainer = pl.Trainer(
                max_epochs=1, enable_progress_bar=False, enable_model_summary=False, logger=False,
                default_root_dir=tmp_path / place, num_sanity_val_steps=0,
                callbacks=[FeatureHealth(), panda.SampleWiseEarlyStopping()] if kind == "PANDA" else [], **where,
            )  # fmt: skip
            (trainer.fit if detector.learns else trainer.test)(detector, data)
            logged = trainer.callback_metrics.items()
            numbers = {key: float(value) for key, value in logged if "seconds" not in key}
            numbers["by hand"] = detector.score(folder / "test").score.sum()
        found.append((detector.scores.score, numbers))
    (scores, numbers), (there, others) = found
    assert scores.dtype == torch.float32 or kind == "OC-SVM"
    tolerance = 1e-6 if kind == "OC-SVM" else 0.0  # whose scores are float64, but on this device
    torch.testing.assert_close(there.double(), scores.double(), rtol=tolerance, atol=tolerance)
    assert others == pytest.approx(numbers, rel=tolerance, abs=tolerance)
    assert len(numbers) > 2
