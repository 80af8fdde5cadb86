"""Rectangles, and images that keep their own shape, through every method."""

import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image

from panda_lightning import DN2, MSC, OCSVM, PANDA, SPADE, DeepSVDD, ImageFolder, MultiHeadRotNet, PandaError, PatchCore
from panda_lightning.callbacks import Predictions
from panda_lightning.formulas.pixel_metrics import PixelHistogram
from panda_lightning.networks.backbones import Backbone
from tests.conftest import make_mixed


@pytest.fixture
def mixed(tmp_path):
    return make_mixed(tmp_path / "images")


def module(root, **options):
    own = {"normal_class": "spot", "image_size": 64, "crop": "none", "batch_size": 4, "eval_batch_size": 3}
    return ImageFolder(root=str(root), **{**own, **options})


def trainer(tmp_path, epochs=1, **options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=epochs,
        enable_checkpointing=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip


TRAINING_FREE = [lambda: DN2("panda_tiny"), lambda: PatchCore("panda_tiny", coreset=0.2, sigma=1.0)]
TRAINED = [
    lambda: PANDA("panda_tiny", adapt_stages=1, ewc_weight=0.0, grad_clip=10.0),
    lambda: MSC("panda_tiny", adapt_stages=1),
]


@pytest.mark.parametrize("make", TRAINING_FREE, ids=["DN2", "PatchCore"])
def test_scores_of_several_sizes_are_those_of_images_one_by_one(tmp_path, mixed, make):
    detector, data, run = make(), module(mixed), trainer(tmp_path)
    run.test(detector, data, verbose=False)
    run.save_checkpoint(tmp_path / "last.ckpt")
    files = data.test_images.sources
    assert detector.scores.index.tolist() == list(range(len(files)))
    again = type(detector).load_from_checkpoint(tmp_path / "last.ckpt")
    found = again.score(list(files), batch_size=4)
    assert found.names == [str(file) for file in files]
    np.testing.assert_allclose(found.score, detector.scores.score, rtol=1e-4)
    alone = [again.score(file) for file in files[:4]]
    np.testing.assert_allclose([one.score[0] for one in alone], found.score[:4], rtol=1e-4)
    if found.maps is not None:
        assert [m.shape for m in found.maps] == [data.view.shape(Image.open(file).size) for file in files]
        np.testing.assert_allclose(found.maps[2], alone[2].maps[0], rtol=1e-3, atol=1e-3)
    fewer = module(mixed, memory_gb=0, num_workers=0, eval_batch_size=100)
    trainer(tmp_path).test(other := make(), fewer, verbose=False)
    torch.testing.assert_close(other.scores.score, detector.scores.score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", TRAINED, ids=["PANDA", "MSC"])
def test_training_takes_every_image_of_several_sizes_and_caches_none(tmp_path, mixed, make, caplog):
    torch.manual_seed(0)
    detector, data = make(), module(mixed)
    trainer(tmp_path).fit(detector, data)
    assert detector.steps_trained == len(data.train_dataloader()) == 3  # of 12 images, 4 of each size
    assert "is not cached, because they have different sizes" in caplog.text
    assert detector.score(list(data.test_images.sources)).score.shape == (13,)


def test_the_bank_of_patches_is_that_of_each_image(tmp_path, mixed):
    detector, data = PatchCore("panda_tiny", coreset=1.0, sigma=1.0), module(mixed)
    trainer(tmp_path).test(detector, data, verbose=False)
    shown = data.normal_dataloader().dataset
    parts = [detector.embed({"image": shown.pictures(torch.tensor([row]))})[0] for row in range(len(shown))]
    torch.testing.assert_close(detector.bank, torch.cat(parts), rtol=1e-4, atol=1e-4)
    assert torch.bincount(detector.bank_images).tolist() == [len(part) for part in parts]
    assert len({len(part) for part in parts}) == 3


@pytest.mark.parametrize("make", TRAINING_FREE, ids=["DN2", "PatchCore"])
def test_a_rectangle_is_a_view_like_any_other(tmp_path, mixed, make):
    data, run, detector = module(mixed, image_size=[64, 96], crop="squash"), trainer(tmp_path), make()
    run.test(detector, data, verbose=False)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = type(detector).load_from_checkpoint(tmp_path / "last.ckpt")
    found = again.score(list(data.test_images.sources))
    np.testing.assert_allclose(found.score, detector.scores.score, rtol=1e-4)
    assert found.maps is None or found.maps.shape == (13, 64, 96)
    with pytest.raises(PandaError, match=r"image_size=\[96, 64\], not \[64, 96\]|image_size=64, not \[64, 96\]"):
        trainer(tmp_path).test(again, module(mixed, image_size=64, crop="squash"), verbose=False)


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (
            lambda: SPADE("panda_tiny"),
            {},
            r"crop=none gives images of different sizes, but SPADE needs one size: .*\[H, W\]",
        ),
        (lambda: OCSVM(inputs="pixels"), {}, "crop=none gives images of different sizes, but OC-SVM needs one size"),
        (MultiHeadRotNet, {}, "crop=none gives images of different sizes, but MultiHeadRotNet needs one size"),
        (DeepSVDD, {}, "crop=none gives images of different sizes, but DeepSVDD needs one size"),
        (
            MultiHeadRotNet,
            {"crop": "squash", "image_size": [32, 64]},
            r"image_size=\[32, 64\] is not square, but Multi",
        ),
        (DeepSVDD, {"crop": "squash", "image_size": [32, 64]}, r"image_size=\[32, 64\] is not square, but DeepSVDD"),
        (lambda: DN2("panda_tiny", shard_bank=True), {}, "shard_bank needs images of one size"),
        (lambda: DN2("panda_tiny"), {"image_size": 16}, "image_size=16 is smaller than the stride"),
        (lambda: DN2("panda_tiny"), {"crop": "center", "image_size": [16, 64]}, r"image_size=\[16, 64\] is smaller"),
    ],
)
def test_shapes_that_a_method_cannot_take_are_said_before_images_are_decoded(tmp_path, mixed, make, options, sentence):
    detector, data = make(), module(mixed, **options)
    with pytest.raises(PandaError, match=sentence):
        (trainer(tmp_path).fit if detector.learns else trainer(tmp_path).test)(detector, data)
    assert not data.decoded


def with_network(detector, name, **options):
    detector.backbone = Backbone(timm.create_model(name, num_classes=10, **options), 0, options)
    return detector


@pytest.mark.parametrize("make", [lambda: DN2("x"), lambda: PatchCore("x", coreset=0.2)], ids=["DN2", "PatchCore"])
def test_sides_are_multiples_of_a_networks_patches(tmp_path, mixed, make):
    detector, data = with_network(make(), "vit_tiny_patch16_224", dynamic_img_size=True), module(mixed)
    run = trainer(tmp_path)
    run.test(detector, data, verbose=False)
    shapes = {tuple(batch["image"].shape[2:]) for batch in data.test_dataloader()}
    assert shapes == {(64, 64), (64, 128), (96, 64)}  # 64 x 90 px, rounded
    run.save_checkpoint(tmp_path / "last.ckpt")
    found = type(detector).load_from_checkpoint(tmp_path / "last.ckpt").score(list(data.test_images.sources))
    np.testing.assert_allclose(found.score, detector.scores.score, rtol=1e-3)
    with pytest.raises(PandaError, match="image_size=72 is not a multiple of the 16 px patches .*: choose 64 or 80"):
        trainer(tmp_path).test(with_network(make(), "vit_tiny_patch16_224", dynamic_img_size=True),
                               module(mixed, image_size=72), verbose=False)  # fmt: skip


def test_a_network_of_one_size_is_refused(tmp_path, mixed):
    data = module(mixed, image_size=224)
    with pytest.raises(PandaError, match="crop=none gives images of different sizes, but levit_128s needs one size"):
        trainer(tmp_path).test(with_network(DN2("x"), "levit_128s"), data, verbose=False)
    assert not data.decoded


def test_maps_have_the_pixels_of_the_original_images(tmp_path, mixed):
    for crop, maps in (("center", "maps"), ("none", "maps-v1")):
        detector, data, run = (
            PatchCore("panda_tiny", coreset=0.2, sigma=1.0),
            module(mixed, crop=crop),
            trainer(tmp_path),
        )
        run.callbacks.append(Predictions(map_size="original"))
        run.test(detector, data, verbose=False)
        run.predict(detector, data)
        files = [str(file) for file in data.test_images.sources]
        found = detector.score(files, map_size="original")
        small = detector.score(files)
        for file, name, own, seen in zip(files, data.names(data.test_images), found.maps, small.maps, strict=True):
            size = Image.open(file).size
            assert own.shape == size[::-1]
            np.testing.assert_array_equal(own, data.view.undone(torch.from_numpy(seen), size))
            np.testing.assert_allclose(np.load(tmp_path / f"{maps}/{name}.npy"), own, rtol=1e-4, atol=1e-5)
            shown = np.asarray(Image.open(tmp_path / f"{maps}/{name}.png"))
            plain = np.asarray(Image.open(file).convert("RGB"))
            assert shown.shape == plain.shape
            cut = np.isnan(own)
            assert cut.any() == (crop == "center")
            np.testing.assert_array_equal(shown[cut], plain[cut])


def test_predictions_and_scores_follow_the_metrics_of_the_detector(tmp_path, mixed):
    data, run = module(mixed, crop="center"), trainer(tmp_path)
    detector = PatchCore("panda_tiny", coreset=0.2, map_size="original")
    run.test(detector, data, verbose=False)
    run.predict(detector, data)
    (name, *_), (file, *_) = data.names(data.test_images), data.test_images.sources
    assert np.load(tmp_path / f"maps/{name}.npy").shape == Image.open(file).size[::-1]
    assert detector.score(str(file)).maps[0].shape == Image.open(file).size[::-1]
    assert detector.score(str(file), map_size="view").maps[0].shape == (64, 64)


@pytest.mark.parametrize("crop", ["none", "squash"])
def test_steps_are_counted_before_images_are_decoded(tmp_path, mixed, crop):
    data = module(mixed, crop=crop, batch_size=3)
    data.setup("fit")
    counts = data.steps(train=True), data.steps(train=False)
    assert not data.decoded
    assert counts == (len(data.train_dataloader()), len(data.val_dataloader()))
    assert counts == ((5, 6) if crop == "none" else (4, 5))


def test_pixels_of_original_images_are_counted_with_what_was_cut_away_as_least(tmp_path, mixed):
    data = module(mixed, crop="center")
    detector = PatchCore("panda_tiny", coreset=0.2, sigma=1.0, map_size="original")
    (result,) = trainer(tmp_path).test(detector, data, verbose=False)
    images, wanted = data.test_images, PixelHistogram()
    maps = detector.score([str(file) for file in images.sources], map_size="original").maps
    known = 0
    for values, label, mask in zip(maps, data.is_anomalous(images.targets), images.masks, strict=True):
        if label and mask is None:
            continue
        truth = np.zeros(values.shape, bool) if mask is None else np.asarray(Image.open(mask)) > 0
        known += values.size
        wanted.add(torch.from_numpy(np.where(np.isnan(values), -np.inf, values))[None], torch.from_numpy(truth)[None])
    assert int(detector.pixels.counts[:2].sum()) == known
    found = wanted.metrics()
    assert result["test/pixel_auroc"] == pytest.approx(found.auroc, abs=1e-3)
    assert result["test/pro"] == pytest.approx(found.pro, abs=1e-3)
    assert found.auroc_error < 0.01
    (other,) = trainer(tmp_path).test(
        PatchCore("panda_tiny", coreset=0.2, sigma=1.0), module(mixed, crop="center"), verbose=False
    )
    assert other["test/pixel_auroc"] != result["test/pixel_auroc"]


def test_predictions_of_loose_images_of_several_sizes_are_in_order(run, mixed, workdir):
    words = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=CSVLogger",
             "--trainer.logger.save_dir=runs")  # fmt: skip
    run(
        "test", *words, "--model=DN2", "--model.backbone=panda_tiny", "--data=ImageFolder", f"--data.root={mixed}",
        "--data.normal_class=spot", "--data.image_size=64", "--data.crop=none", "--data.eval_batch_size=4",
    )  # fmt: skip
    (checkpoint,) = workdir.rglob("last.ckpt")
    (mixed / "test/spot/broken.png").write_bytes(b"no image")
    run(
        "predict", *words, "--model=DN2", f"--ckpt_path={checkpoint}", "--data=UnlabelledImages",
        f"--data.images={mixed / 'test'}", "--data.eval_batch_size=4", "--data.num_workers=0",
    )  # fmt: skip
    (table,) = workdir.rglob("predictions.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    found = DN2.load_from_checkpoint(checkpoint).score(str(mixed / "test"))
    assert found.names == [row["path"] for row in rows]
    assert [row["score"] == "" for row in rows] == np.isnan(found.score).tolist()
    scores = np.array([float(row["score"] or "nan") for row in rows])
    np.testing.assert_allclose(scores, found.score, rtol=1e-4)
