"""What SPADE and PatchCore share; each has its own file for its formula."""

import csv
import subprocess

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from panda_lightning import SPADE, HyperKvasir, MVTecAD, PandaError, PatchCore
from tests.conftest import fast, make_folder
from tests.datamodules.official import make_mvtec
from tests.datamodules.official_medical_aerial import make_labeled


def trainer(tmp_path, **options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip


def mvtec(tmp_path, **options):
    if not (tmp_path / "bottle").is_dir():
        make_mvtec(tmp_path)
    return MVTecAD(root=str(tmp_path), **{"image_size": 64, "crop": "squash", "eval_batch_size": 3, **options})


METHODS = [lambda **o: SPADE("panda_tiny", k=3, **o), lambda **o: PatchCore("panda_tiny", coreset=0.3, **o)]


@pytest.mark.parametrize("method", METHODS, ids=["SPADE", "PatchCore"])
def test_pixels_are_counted_whatever_the_batches_and_the_checkpoint_has_the_bank(tmp_path, method):
    detector = method()
    (result,) = trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)
    assert set(result) == {
        "test/auroc", "test/pixel_auroc", "test/pro", "test/pixel_ap", "test/pixel_f1_oracle", "epochs_trained",
    }  # fmt: skip
    assert int(detector.pixels.counts[:2].sum()) == 8 * 64 * 64
    assert int(detector.pixels.counts[1].sum()) == 4 * 32 * 64  # the masks' upper halves
    assert result["test/pixel_auroc"] > 0.5
    (other,) = trainer(tmp_path).test(method(), mvtec(tmp_path, eval_batch_size=100), verbose=False)
    assert other == pytest.approx(result, rel=1e-5)

    run = trainer(tmp_path)
    run.test(detector, mvtec(tmp_path), verbose=False)
    run.save_checkpoint(tmp_path / "last.ckpt")
    for image in (tmp_path / "bottle/train/good").iterdir():
        image.unlink()
    again = type(detector).load_from_checkpoint(tmp_path / "last.ckpt")
    (third,) = trainer(tmp_path).test(again, mvtec(tmp_path), verbose=False)
    assert third == pytest.approx(result, rel=1e-6)


def test_the_range_is_that_of_the_maps_of_the_last_validation(tmp_path):
    class Scaled(SPADE):
        factor = 1.0

        def score_and_map(self, batch):
            found = super().score_and_map(batch)
            return {**found, "map": found["map"] * self.factor}

    detector, module, run = Scaled("panda_tiny", k=3, sigma=1.0), mvtec(tmp_path), trainer(tmp_path)
    for loop in (run.validate, run.test):
        for factor in (10.0, 1.0):
            detector.factor = factor
            loop(detector, module, verbose=False)
            maps = torch.cat([found["map"] for found in run.predict(detector, module)])
            assert detector.value_range == pytest.approx((float(maps.min()), float(maps.max())), rel=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=["SPADE", "PatchCore"])
def test_a_bank_in_half_precision_is_half_as_large_and_nearly_the_same(tmp_path, method):
    half, whole = method(half_bank=True), method()
    results = [trainer(tmp_path).test(d, mvtec(tmp_path), verbose=False)[0] for d in (half, whole)]
    assert half.bank.dtype == torch.float16
    assert half.bank.shape == whole.bank.shape
    torch.testing.assert_close(half.scores.score, whole.scores.score, rtol=2e-2, atol=1e-2)
    assert results[0]["test/pixel_auroc"] == pytest.approx(results[1]["test/pixel_auroc"], abs=5e-3)


def test_maps_are_smoothed_as_by_scipy():
    detector = SPADE("panda_tiny", sigma=2.0)
    maps = torch.rand(2, 40, 50)
    expected = [gaussian_filter(m.double().numpy(), 2.0, mode="mirror", truncate=4.0) for m in maps]
    np.testing.assert_allclose(detector._smoothed(maps), np.stack(expected), rtol=1e-3)
    assert torch.equal(SPADE("panda_tiny", sigma=0.0)._smoothed(maps), maps)


def halving(backbone, images, levels, pooled=False):
    """Stands for a network that sees nothing beyond a pixel: tiles change nothing."""
    x = images.float()
    maps = [nn.functional.avg_pool2d(x, 2**level) for level in levels]
    return [*maps, x.mean(dim=(2, 3))] if pooled else maps


def test_tiles_are_put_together_where_they_were(monkeypatch):
    monkeypatch.setattr("panda_lightning.detectors.segmentation.pyramid", halving)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole, tiled = SPADE("x"), SPADE("x", tile=16)
    whole.backbone = tiled.backbone = nn.Identity()
    for a, b in zip(whole.pyramid(images, pooled=True), tiled.pyramid(images, pooled=True), strict=True):
        torch.testing.assert_close(a, b)


def test_tiles_run(tmp_path):
    (result,) = trainer(tmp_path).test(SPADE("panda_tiny", k=2, tile=32), mvtec(tmp_path), verbose=False)
    assert 0 <= result["test/pixel_auroc"] <= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tile": 24}, "tile=24 does not suit image_size=64: choose a divisor"),
        ({"tile": 16}, "tile=16 is smaller than the stride of resnet10t: choose 32 or more"),
    ],
)
def test_what_cannot_work_is_said_before_images_are_decoded(tmp_path, options, sentence):
    module = mvtec(tmp_path)
    with pytest.raises(PandaError, match=sentence):
        trainer(tmp_path).test(SPADE("panda_tiny", **{"k": 2, **options}), module, verbose=False)
    assert not module.decoded


def test_spade_compares_with_all_images_where_there_are_fewer_than_k(tmp_path, caplog):
    found = []
    for k in (6, 50):
        detector = SPADE("panda_tiny", k=k)
        trainer(tmp_path / str(k)).test(detector, mvtec(tmp_path), verbose=False)
        found.append(detector.scores.score)
    assert torch.equal(*found)
    assert "SPADE compares with all 6 normal images, fewer than k=50" in caplog.text


def test_an_adapted_network_feeds_them(run, workdir):
    folder = make_folder(workdir / "images")
    run("fit", *fast(folder, epochs=1), "--model.ewc_weight=0", "--model.grad_clip=10")
    last = workdir / "runs/t/version_0/checkpoints/last.ckpt"
    words = [w for w in fast(folder, model="PatchCore") if "backbone" not in w]
    run("test", *words, f"--model.backbone={last}")
    adapted = torch.load(last, weights_only=True)["state_dict"]
    used = torch.load(workdir / "runs/t/version_1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(used[name], value) for name, value in adapted.items() if name.startswith("backbone"))


def test_maps_are_drawn_and_predicted(run, workdir):
    make_mvtec(workdir / "data")
    words = [w for w in fast(workdir / "data", model="SPADE") if "normal_class" not in w and "ImageFolder" not in w]
    words += ["--data=MVTecAD", "--model.k=2"]
    words.sort(key=lambda w: w.startswith(("--data.", "--model.")))  # a class before its arguments
    out = run("test", *words)
    assert "Pixels: AUROC 0." in out
    assert "(oracle); at 32 px, sigma 4" in out
    assert Image.open(workdir / "runs/t/version_0/maps.png").width > 500
    last = workdir / "runs/t/version_0/checkpoints/last.ckpt"
    run("predict", *words, f"--ckpt_path={last}")
    folder = workdir / "runs/t/version_1"
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"bottle/test/{kind}/{n:03d}.png" for kind in ("broken", "good") for n in range(4)]
    assert [r["path"] for r in rows] == [str(workdir / "data" / name) for name in names]
    for name in names:
        path = folder / "maps" / name
        values = np.load(f"{path}.npy")
        assert values.shape == (32, 32)
        assert values.dtype == np.float32
        assert np.asarray(Image.open(f"{path}.png")).shape == (32, 32, 3)


@pytest.mark.slow
def test_real_polyps_have_pixel_metrics(shared, tmp_path):
    """Runs on real masks; with spots for normal mucosa, the number means nothing."""
    subprocess.run([shared / "data/unpack", tmp_path, "hyper_kvasir"], check=True)
    root = tmp_path / "hyper_kvasir"
    (root / "2_fold_split.csv").unlink()  # which lists images that are not here
    make_labeled(root, {"cecum": 12})
    data = HyperKvasir(root=str(root), image_size=64, test_normals=4)
    (result,) = trainer(tmp_path).test(PatchCore("panda_tiny"), data, verbose=False)
    assert len(data.test_images) == 104
    assert 0 < result["test/pro"] < 1
