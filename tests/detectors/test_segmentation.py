"""What SPADE and PatchCore share; each has its own file for its formula."""

import csv
import subprocess
from contextlib import nullcontext

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from panda_lightning import SPADE, Backbone, HyperKvasir, MVTecAD, PandaError, PatchCore
from panda_lightning.networks.pyramid import pyramid
from tests.conftest import fast, make_folder, small_network
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


TOO_LARGE, NO_NUMBERS = "normal features are too large for float16, which ends at 65504", "are not all finite numbers"


@pytest.mark.parametrize("method", METHODS, ids=["SPADE", "PatchCore"])
@pytest.mark.parametrize(
    ("std", "half", "sentence"),
    [(1e-8, False, None), (1e-8, True, TOO_LARGE), (torch.nan, False, NO_NUMBERS), (torch.nan, True, NO_NUMBERS)],
)
def test_features_that_a_bank_cannot_hold_are_said(tmp_path, method, std, half, sentence):
    detector = method(half_bank=half)
    detector.load_backbone()
    with torch.no_grad():
        detector.backbone.std *= std
    with pytest.raises(PandaError, match=sentence) if sentence else nullcontext():
        trainer(tmp_path).test(detector, mvtec(tmp_path), verbose=False)


def test_maps_are_smoothed_as_by_scipy():
    detector = SPADE("panda_tiny", sigma=2.0)
    maps = torch.rand(2, 40, 50)
    expected = [gaussian_filter(m.double().numpy(), 2.0, mode="mirror", truncate=4.0) for m in maps]
    np.testing.assert_allclose(detector._smoothed(maps), np.stack(expected), rtol=1e-3)
    assert torch.equal(SPADE("panda_tiny", sigma=0.0)._smoothed(maps), maps)


def convolving(kernel):
    """Stands for a network: each level is one convolution of the image that sees ``kernel`` x ``kernel`` pixels."""
    torch.manual_seed(0)
    layers = {level: nn.Conv2d(3, 4, kernel, 2 << level, kernel // 2) for level in (1, 2, 3)}

    @torch.no_grad()
    def maps(backbone, images, levels, pooled=False, at_once=None):
        x = images.float() / 255
        return [layers[level](x).tanh() for level in levels] + [x.mean(dim=(2, 3))] * pooled

    return maps


@pytest.fixture
def pyramids(monkeypatch):
    """Maps of whole images and of tiles, by a network that sees ``kernel`` x ``kernel`` pixels."""

    def both(kernel, size, **options):
        name = "panda_lightning.detectors.segmentation"
        monkeypatch.setattr(f"{name}.pyramid", convolving(kernel))
        monkeypatch.setattr(f"{name}.level_strides", lambda backbone, levels: [2 << level for level in levels])
        torch.manual_seed(1)
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        found = []
        for detector in (SPADE("x"), SPADE("x", **options)):
            detector.backbone = nn.Identity()
            found.append(detector.pyramid(images, pooled=True))
        return found

    return both


@pytest.mark.parametrize("overlap", [0, 16, 32, 48])
@pytest.mark.parametrize("size", [(64, 64), (128, 192), (65, 200), (190, 100)])
def test_tiles_change_nothing_for_a_network_that_sees_single_pixels(pyramids, size, overlap):
    (*whole, _), (*tiled, _) = pyramids(1, size, tile=64, overlap=overlap)
    assert [m.shape[2:] for m in tiled] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16)]
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_inside_tiles_a_convolution_gives_the_map_of_the_whole_image(pyramids, overlap):
    whole, tiled = pyramids(3, (112, 160), tile=64, overlap=overlap)
    for one, other, stride in zip(whole, tiled, (4, 8, 16), strict=False):
        outside = torch.zeros(one.shape[2:], dtype=torch.bool)  # where a tile misses the pixels beside it
        for dim, length in enumerate((112, 160)):
            begins = torch.tensor([b for b in {*range(0, length - 64, 64 - overlap), length - 64} if b]) // stride
            outside.index_fill_(dim, begins, True)
        near = torch.isclose(one, other, rtol=1e-5, atol=1e-6).all(dim=1).all(dim=0)
        assert bool(near[~outside].all())
        assert not bool(near[outside].any())


def test_features_of_an_image_are_the_mean_of_its_tiles(pyramids):
    (*_, whole), (*_, tiled) = pyramids(1, (64, 96), tile=32)
    torch.testing.assert_close(whole, tiled)


@pytest.mark.parametrize("tile", [32, 64])
def test_tiles_without_overlap_lie_side_by_side_to_the_bit(tile):
    detector = SPADE("panda_tiny", tile=tile)
    detector.load_backbone()
    images = torch.randint(0, 256, (3, 3, 128, 192), dtype=torch.uint8)
    places = [(y, x) for y in range(0, 128, tile) for x in range(0, 192, tile)]
    tiles = torch.stack([images[:, :, y : y + tile, x : x + tile] for y, x in places], dim=1)
    *maps, pooled = pyramid(detector.backbone, tiles.flatten(0, 1), detector.levels, pooled=True)
    *found, mean = detector.pyramid(images, pooled=True)
    for of_tiles, whole in zip(maps, found, strict=True):
        side = of_tiles.shape[2]
        parts = of_tiles.unflatten(0, (3, -1))
        for i, (y, x) in enumerate(places):
            row, column = y * side // tile, x * side // tile
            assert torch.equal(whole[:, :, row : row + side, column : column + side], parts[:, i])
    assert torch.equal(mean, pooled.unflatten(0, (3, -1)).mean(dim=1))


def test_tiles_pass_the_network_in_portions(monkeypatch):
    detector, seen = PatchCore("panda_tiny", tile=32, optimize="plain"), []
    detector.load_backbone()
    detector.backbone.model.conv1.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    monkeypatch.setattr(Backbone, "cached", lambda self, images: len(images))  # as on a GPU
    detector.pyramid(torch.zeros(3, 3, 96, 96, dtype=torch.uint8))
    assert seen == [16, 11]


@pytest.mark.parametrize("method", METHODS, ids=["SPADE", "PatchCore"])
@pytest.mark.parametrize("options", [{}, {"tile": 64, "overlap": 32}])
def test_images_need_not_be_square(method, options):
    detector = method(sigma=1.0, **options)
    detector.load_backbone()
    images = torch.randint(0, 256, (3, 3, 70, 150), dtype=torch.uint8)
    rows = detector.embed({"image": images})
    detector.bank = rows.flatten(0, 1) if isinstance(detector, PatchCore) else rows
    detector.fit_index()
    images[0, :, 10:40, 100:140] = 0
    found = detector.outputs({"image": images})["map"]
    assert found.shape == (3, 70, 150)
    assert divmod(int(found[0].argmax()), 150)[0] in range(5, 45)
    assert divmod(int(found[0].argmax()), 150)[1] in range(95, 145)
    assert found[1:].max() < 0.1 * found[0].max()


@pytest.mark.parametrize("method", METHODS, ids=["SPADE", "PatchCore"])
def test_tiles_run_and_say_their_memory(tmp_path, caplog, method):
    module = mvtec(tmp_path, image_size=100)
    (result,) = trainer(tmp_path).test(method(tile=64, overlap=16, levels=(2, 3)), module, verbose=False)
    assert 0 <= result["test/pixel_auroc"] <= 1
    # four tiles of 8 x 8 positions of 64 values, and of 4 x 4 of 128
    assert f"the features of its 4 tiles {4 * 4 * (64 * 64 + 16 * 128) / 2**20:.2f} MiB; 16 tiles pass" in caplog.text


def test_a_network_of_one_size_serves_for_larger_images_in_tiles(tmp_path):
    name = small_network(tmp_path / "vit", "vit")
    detector = PatchCore(name, coreset=0.3, levels=(2, 4), tile=32, overlap=8)
    (result,) = trainer(tmp_path).test(detector, mvtec(tmp_path, image_size=70), verbose=False)
    assert 0 <= result["test/pixel_auroc"] <= 1
    with pytest.raises(PandaError, match="image_size=70 is not a multiple of the 8 px patches"):
        trainer(tmp_path).test(PatchCore(name, levels=(2, 4)), mvtec(tmp_path, image_size=70), verbose=False)


def test_a_network_whose_maps_do_not_lie_side_by_side_is_refused(monkeypatch):
    monkeypatch.setattr(
        "panda_lightning.detectors.segmentation.pyramid", lambda *_: [torch.zeros(4, 3, 7, 7), torch.zeros(4, 3, 4, 4)]
    )
    detector = PatchCore("panda_tiny", tile=64)
    detector.load_backbone()
    with pytest.raises(PandaError, match="resnet10t gives a map of 7 positions of 8 px for tiles of 64 px"):
        detector.embed({"image": torch.zeros(1, 3, 128, 128, dtype=torch.uint8)})


def test_an_image_smaller_than_a_tile_is_refused(pyramids):
    with pytest.raises(PandaError, match="tile=64 is larger than images of 60 x 96 px: choose 60 or less"):
        pyramids(1, (60, 96), tile=64)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tile": 16}, "tile=16 is smaller than the stride of resnet10t: choose 32 or more"),
        ({"tile": 40}, "tile=40 is not a multiple of 16 px.* choose 32 or 48"),
        ({"tile": 128}, "tile=128 is larger than images of 64 x 64 px: choose 64 or less"),
        ({"overlap": 16}, "overlap=16 applies only to tiles, but images are not cut into tiles"),
        ({"tile": 32, "overlap": 32}, "overlap=32 is not smaller than tile=32: choose 0 to 31"),
        ({"tile": 32, "overlap": 10}, "overlap=10 is not a multiple of 16 px.* choose 0 or 16"),
    ],
)
def test_what_cannot_work_is_said_before_images_are_decoded(tmp_path, options, sentence):
    module = mvtec(tmp_path)
    with pytest.raises(PandaError, match=sentence):
        trainer(tmp_path).test(SPADE("panda_tiny", **{"k": 2, **options}), module, verbose=False)
    assert not module.decoded


def test_an_overlap_is_no_number_below_zero():
    with pytest.raises(PandaError, match="overlap=-1 is not allowed: choose a whole number, 0 or more"):
        PatchCore("panda_tiny", tile=32, overlap=-1)


def test_spade_compares_with_all_images_where_there_are_fewer_than_k(tmp_path, caplog):
    found = []
    for k in (6, 50):
        detector = SPADE("panda_tiny", k=k)
        trainer(tmp_path / str(k)).test(detector, mvtec(tmp_path), verbose=False)
        found.append(detector.scores.score)
    assert torch.equal(*found)
    assert "SPADE compares with all 6 normal images, because there are fewer than k=50" in caplog.text


def test_an_adapted_network_feeds_them(run, workdir):
    folder = make_folder(workdir / "images")
    run("fit", *fast(folder, epochs=1), "--model.ewc_weight=0", "--model.grad_clip=10")
    last = workdir / "runs/t/version_0/checkpoints/last.ckpt"
    words = [w for w in fast(folder, model="PatchCore") if "backbone" not in w]
    run("test", *words, f"--model.backbone={last}")
    adapted = torch.load(last, weights_only=True)["state_dict"]
    used = torch.load(workdir / "runs/t/version_1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(used[name], value) for name, value in adapted.items() if name.startswith("backbone"))


@pytest.mark.pictures
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
