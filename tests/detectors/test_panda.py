import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from panda_lightning import PANDA, Backbone, ImageFolder, PandaError
from panda_lightning.datamodules.loaders import ShardedSampler
from panda_lightning.formulas import fisher
from panda_lightning.networks.loading import BUNDLED
from tests.conftest import make_folder, picture, small_network

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(tmp_path, epochs=2, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def data(folder, **options):
    options = {"batch_size": 4, "eval_batch_size": 4, "image_size": 32, "crop": "squash", **options}
    return ImageFolder(root=str(folder), normal_class="spot", interpolation="bicubic", **options)


class Curve(pl.Callback):
    """Keeps what validation logs."""

    def __init__(self):
        self.points = []

    def on_validation_end(self, trainer, pl_module):
        m = trainer.callback_metrics
        scores = pl_module.scores.score.clone()
        self.points.append((float(m["epochs_trained"]), float(m["val/auroc"]), scores))


def plain_training(folder, *, steps, ewc_weight, diagonal=None, normalize=False):
    """PANDA as a bare loop over torch alone; returns the adapted parameters."""
    backbone = Backbone.pretrained("panda_tiny")
    module = data(folder)
    module.setup("fit")
    batches = module.normal_dataloader().dataset
    images = batches.__getitems__(range(11))["image"]

    def space(features):
        return features / features.norm(dim=1, keepdim=True) if normalize else features

    with torch.no_grad():
        centre = space(backbone(images)).mean(dim=0)
    params = backbone.adapted()
    start = {name: p.detach().clone() for name, p in params.items()}
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    taken = 0
    for epoch in range(100):
        sampler = ShardedSampler(11, 1, 0, shuffle=True)
        sampler.set_epoch(epoch)
        for rows in torch.tensor(list(sampler)).split(4):
            loss = ((space(backbone(images[rows])) - centre) ** 2).mean(dim=1).mean()
            for name, p in params.items():
                if ewc_weight:
                    loss = loss + ewc_weight / 2 * (diagonal[name] * (p - start[name]) ** 2).sum()
            gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
            norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
            with torch.no_grad():
                for name, p in params.items():
                    step = gradients[name] * min(1.0, 1e-3 / (norm + 1e-6)) + 5e-5 * p
                    velocity[name] = 0.9 * velocity[name] + step
                    p -= 1e-2 * velocity[name]
            taken += 1
            if taken == steps:
                return params
    raise AssertionError


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ewc_weight", [0.0, 1e4])
def test_training_is_that_of_a_plain_loop(tmp_path, folder, ewc_weight, normalize):
    detector = PANDA("panda_tiny", ewc_weight=ewc_weight, fisher=str(tmp_path / "f.pth"), normalize_loss=normalize)
    backbone = Backbone.pretrained("panda_tiny")
    torch.manual_seed(0)
    diagonal = {name: torch.rand_like(p) * 1e-3 for name, p in backbone.adapted().items()}
    torch.save(diagonal, tmp_path / "f.pth")
    trainer(tmp_path, epochs=3).fit(detector, data(folder))
    expected = plain_training(folder, steps=9, ewc_weight=ewc_weight, diagonal=diagonal, normalize=normalize)
    moved = 0.0
    for name, p in detector.backbone.adapted().items():
        start = backbone.adapted()[name]
        moved = max(moved, float((p - start).abs().max()))
        torch.testing.assert_close(p - start, expected[name] - start, rtol=1e-3, atol=2e-7)  # float32 near 1
    assert moved > 1e-6


def test_only_the_adapted_part_moves_and_batchnorm_buffers_never(tmp_path, folder):
    before = Backbone.pretrained("panda_tiny").model.state_dict()
    detector = PANDA("panda_tiny", ewc_weight=0, grad_clip=1.0, weight_decay=0)
    trainer(tmp_path).fit(detector, data(folder))
    after, adapted = detector.backbone.model.state_dict(), detector.backbone.adapted()
    for name, value in after.items():
        if name in adapted:
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name
    assert any(name.endswith("running_mean") for name in after)
    assert not any(m.training for m in detector.backbone.modules())


def test_the_centre_is_that_of_the_pretrained_features(tmp_path, folder):
    module, detector = data(folder), PANDA("panda_tiny", ewc_weight=0, grad_clip=1.0)
    trainer(tmp_path).fit(detector, module)
    with torch.no_grad():
        images = module.normal_dataloader().dataset.__getitems__(range(11))["image"]
        expected = Backbone.pretrained("panda_tiny")(images).mean(dim=0)
    torch.testing.assert_close(detector.centre, expected, rtol=1e-5, atol=1e-6)
    # also where validation, which makes the bank, is switched off
    blind = PANDA("panda_tiny", ewc_weight=0, grad_clip=1.0)
    trainer(tmp_path, limit_val_batches=0).fit(blind, data(folder))
    torch.testing.assert_close(blind.centre, expected, rtol=1e-5, atol=1e-6)


def test_validation_starts_at_zero_epochs_and_follows_the_weights(tmp_path, folder):
    curve, detector = Curve(), PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0)
    trainer(tmp_path, epochs=3, callbacks=[curve]).fit(detector, data(folder))
    assert [p[0] for p in curve.points] == [0.0, 1.0, 2.0, 3.0]
    # the last scores are those of a bank made with the last weights
    module = data(folder)
    module.setup("test")
    with torch.no_grad():
        bank = detector.backbone(module.normal_dataloader().dataset.pixels)
        queries = detector.backbone(module.test_dataloader().dataset.pixels)
    expected = torch.cdist(queries.double(), bank.double()).square().sort(dim=1).values[:, :2].sum(dim=1)
    np.testing.assert_allclose(curve.points[-1][2], expected, rtol=1e-3)
    assert not np.allclose(curve.points[0][2], expected, rtol=1e-2)


def test_epochs_count_fractions_and_accumulation(tmp_path, folder):
    curve = Curve()
    options = {"val_check_interval": 1, "accumulate_grad_batches": 2, "callbacks": [curve]}
    trainer(tmp_path, epochs=1, **options).fit(PANDA("panda_tiny", ewc_weight=0), data(folder))
    assert [p[0] for p in curve.points] == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("source", ["auto", "ones"])
def test_ewc_terms_are_logged_apart(tmp_path, folder, source):
    detector = PANDA("panda_tiny", fisher=source)
    runner = trainer(tmp_path)
    runner.fit(detector, data(folder))
    m = runner.callback_metrics
    for name in ("train/compactness", "train/ewc", "train/loss", "train/grad_norm", "train/distance_from_start"):
        assert np.isfinite(float(m[name])), name
    assert float(m["train/loss"]) == pytest.approx(float(m["train/compactness"] + m["train/ewc"]), rel=1e-5)
    moved = [(p - detector.start[n]).square().sum() for n, p in detector.backbone.adapted().items()]
    assert float(m["train/distance_from_start"]) == pytest.approx(float(sum(moved).sqrt()), rel=1e-4)


def test_auto_takes_the_fisher_that_lies_beside_the_bundled_weights(tmp_path, folder, caplog):
    detector = PANDA("panda_tiny")
    with caplog.at_level("INFO"):
        trainer(tmp_path, epochs=1).fit(detector, data(folder))
    assert "using the diagonal stored with the weights" in caplog.text
    beside = Path(detector.backbone.fisher_file)
    assert beside.parent.name == "panda_tiny"
    assert (beside.stat().st_size + (beside.parent / "model.safetensors").stat().st_size) < 6e6
    with safe_open(beside, "pt") as file:
        header = file.metadata()
        name = "layer4.0.conv2.weight"
        expected = file.get_tensor(name).double() * float(header["scale"])
    assert (header["estimator"], header["convention"], header["samples"]) == ("true labels", "per-sample", "20000")
    torch.testing.assert_close(detector.fisher[name].double(), expected)
    assert header["weights"] == fisher.weights_name(Backbone.pretrained("panda_tiny"))  # so no warning
    more = PANDA("panda_tiny", adapt_stages=3)  # than the file holds
    with caplog.at_level("INFO"):
        trainer(tmp_path, epochs=1).fit(more, data(folder))
    assert "estimated on the normal training images" in caplog.text


def test_an_estimated_fisher_is_kept_and_found_again(tmp_path, folder, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bare = shutil.copytree(BUNDLED / "panda_tiny", tmp_path / "bare", ignore=shutil.ignore_patterns("fisher*"))
    first = PANDA(f"local-dir:{bare}")
    with caplog.at_level("INFO"):
        trainer(tmp_path).fit(first, data(folder))
    assert "the paper uses ImageNet" in caplog.text
    (_,) = (tmp_path / "cache/panda-lightning/fisher").iterdir()
    monkeypatch.setattr(fisher, "estimate", lambda *a, **k: pytest.fail("estimated again"))
    second = PANDA(f"local-dir:{bare}")
    trainer(tmp_path).fit(second, data(folder))
    assert all(torch.equal(first.fisher[name], second.fisher[name]) for name in first.fisher)


@pytest.mark.parametrize("adapt", ["stages", "norm", "lora"])
@pytest.mark.parametrize("network", ["panda_tiny", "vit", "eva"])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, folder, network, adapt, one_thread):
    if network == "panda_tiny" and adapt == "lora":
        pytest.skip("a ResNet has no linear layers")
    backbone = network if network == "panda_tiny" else small_network(tmp_path / "net", network)

    def new():
        return PANDA(backbone, grad_clip=10.0, adapt=adapt, lora_rank=2, ewc_weight=1.0)

    whole = Curve()
    undisturbed = new()
    trainer(tmp_path, epochs=4, callbacks=[whole]).fit(undisturbed, data(folder))

    def save(epochs):
        return ModelCheckpoint(tmp_path / "ck", filename="last", enable_version_counter=False)

    first, second = Curve(), Curve()
    options = {"enable_checkpointing": True}
    trainer(tmp_path, 2, callbacks=[first, save(2)], **options).fit(new(), data(folder))
    resumed = new()
    path = tmp_path / "ck/last.ckpt"
    trainer(tmp_path, 4, callbacks=[second, save(4)], **options).fit(resumed, data(folder), ckpt_path=path)
    points = first.points + second.points
    assert [p[0] for p in points] == [p[0] for p in whole.points] == [0.0, 1.0, 2.0, 3.0, 4.0]
    for got, expected in zip(points, whole.points, strict=True):
        assert got[1] == expected[1]
        torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=0)
    for name, p in undisturbed.backbone.adapted().items():
        torch.testing.assert_close(resumed.backbone.adapted()[name], p, rtol=1e-6, atol=1e-9)
    assert torch.equal(resumed.centre, undisturbed.centre)
    assert undisturbed.trainer.callback_metrics["train/ewc"] > 0
    assert whole.points[-1][2].tolist() != whole.points[0][2].tolist()
    again = PANDA.load_from_checkpoint(path)
    trainer(tmp_path).test(again, data(folder), verbose=False)
    torch.testing.assert_close(again.scores.score, resumed.scores.score, rtol=1e-5, atol=0)
    other = Backbone.pretrained(str(path))  # whatever was trained, its network is one by plain names
    with torch.no_grad():
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        torch.testing.assert_close(other(images), again.backbone(images), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_needs_neither_training_images_nor_weights(tmp_path):
    folder = make_folder(tmp_path / "images")
    weights = tmp_path / "weights"
    shutil.copytree(BUNDLED / "panda_tiny", weights)
    detector = PANDA(f"local-dir:{weights}", ewc_weight=0, grad_clip=10.0)
    runner = trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, filename="last")], enable_checkpointing=True)
    runner.fit(detector, data(folder))
    shutil.rmtree(weights)
    shutil.rmtree(folder / "train")
    again = PANDA.load_from_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path).test(again, data(folder), verbose=False)
    torch.testing.assert_close(again.scores.score, detector.scores.score, rtol=1e-5, atol=0)
    # its network is a backbone for others
    other = Backbone.pretrained(str(tmp_path / "last.ckpt"))
    for name, value in detector.backbone.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)


def test_a_stale_bank_is_rebuilt_or_refused(tmp_path):
    folder = make_folder(tmp_path / "images")
    detector = PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0)
    runner = trainer(tmp_path)
    runner.fit(detector, data(folder))
    detector.bank_weights = "those of an earlier step"
    detector.bank = torch.zeros_like(detector.bank)
    runner.save_checkpoint(tmp_path / "mid.ckpt")
    again = PANDA.load_from_checkpoint(tmp_path / "mid.ckpt")
    trainer(tmp_path).test(again, data(folder), verbose=False)
    torch.testing.assert_close(again.scores.score, detector.scores.score, rtol=1e-5, atol=0)
    shutil.rmtree(folder / "train")
    again = PANDA.load_from_checkpoint(tmp_path / "mid.ckpt")
    with pytest.raises(PandaError, match="has no bank for its weights .* that it learned from are missing here"):
        trainer(tmp_path).test(again, data(folder), verbose=False)


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, folder):
    class Breaks(PANDA):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.current_epoch == 1 and batch_idx == 1 else loss

    keep = ModelCheckpoint(tmp_path / "ck", filename="last")
    runner = trainer(tmp_path, 3, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(
        PandaError, match="NaN or infinite at batch 1 of epoch 1: .*last good checkpoint is .*last.ckpt"
    ):
        runner.fit(Breaks("panda_tiny", ewc_weight=0), data(folder))
    state = torch.load(tmp_path / "ck/last.ckpt", weights_only=True)["state_dict"]
    del state["_extra_state"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_collapsed_features_are_said(tmp_path, folder):
    detector = PANDA("panda_tiny", ewc_weight=0)
    detector.load_backbone()
    nn.init.zeros_(detector.backbone.model.layer4[0].bn2.weight)
    nn.init.zeros_(detector.backbone.model.layer4[0].bn2.bias)
    nn.init.zeros_(detector.backbone.model.layer4[0].downsample[2].weight)
    with pytest.warns(UserWarning, match="collapsed to a point"):
        trainer(tmp_path, 1).fit(detector, data(folder))


def test_the_trainers_own_clipping_is_refused(tmp_path, folder):
    with pytest.raises(PandaError, match="model.grad_clip"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(PANDA("panda_tiny", ewc_weight=0), data(folder))


def test_the_published_recipe_is_the_default():
    detector = PANDA()
    assert detector.hparams == {
        "backbone": "resnet152.tv_in1k", "weights": None, "adapt_stages": 2, "k": 2, "normalize": False,
        "centroids": None, "normalize_loss": False, "ewc_weight": 1e4, "fisher": "auto", "lr": 1e-2, "momentum": 0.9,
        "weight_decay": 5e-5, "grad_clip": 1e-3, "prefix_cache_gb": 4.0, "prefix_cache_half": False,
        "prefix_cache_dir": None, "optimize": "folded", "index_backend": "auto", "index_memory_mb": 512,
        "shard_bank": False, "pool": None, "adapt": "stages", "lora_rank": 8,
        "schedule": "published",
    }  # fmt: skip


class Compactness(pl.Callback):
    """Keeps the compactness of the normal images at each validation, from features of its own."""

    def __init__(self):
        self.points, self.steps = [], []

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(pl_module.steps_trained)
        with torch.no_grad():
            features = pl_module.backbone(
                trainer.datamodule.normal_dataloader().dataset.__getitems__(range(11))["image"]
            )
        centre = features.mean(dim=0) if pl_module.centre is None else pl_module.centre
        self.points.append(float(((features - centre) ** 2).mean()))


@pytest.mark.parametrize(
    "options",
    [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 2},
     {"val_check_interval": 2, "check_val_every_n_epoch": None}],
    ids=str,
)  # fmt: skip
def test_a_schedule_ends_training_at_a_share_of_the_compactness(tmp_path, folder, options):
    whole, cut, again = Compactness(), Compactness(), Compactness()
    options = {"enable_checkpointing": True, **options}

    def new(**schedule):
        return PANDA("panda_tiny", grad_clip=10.0, ewc_weight=0.0, **schedule)

    trainer(tmp_path, 8, callbacks=[whole], **options).fit(new(), data(folder))
    _, first, second, *_ = (point / whole.points[0] for point in whole.points)
    assert second < 0.99 * first
    share = (first + second) / 2
    detector = new(schedule=share)
    kept = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    trainer(tmp_path, 8, callbacks=[cut, kept], **options).fit(detector, data(folder))
    assert cut.points == pytest.approx(whole.points[:3], rel=1e-4)
    assert detector.steps_trained == whole.steps[2]
    path = tmp_path / "last.ckpt"
    resumed = PANDA.load_from_checkpoint(path)
    trainer(tmp_path, 8, callbacks=[again], **options).fit(resumed, data(folder), ckpt_path=path)
    assert resumed.steps_trained == detector.steps_trained
    assert not again.points
    trainer(tmp_path, 8, callbacks=[again], **options).fit(resumed, data(folder))  # a fit of its own is another run
    assert again.points == pytest.approx(whole.points[:3], rel=1e-4)


@pytest.mark.parametrize("unseen", [{}, {"limit_val_batches": 0}], ids=str)
def test_a_schedule_is_of_averaged_weights_where_these_make_the_bank(tmp_path, folder, unseen):
    detector = PANDA("panda_tiny", grad_clip=10.0, ewc_weight=0.0, schedule=0.99)
    trainer(tmp_path, 20, callbacks=[EMAWeightAveraging(decay=0.5)], **unseen).fit(detector, data(folder))
    assert detector.is_compact
    assert detector.epochs_trained < 20


def test_a_schedule_needs_no_validation(tmp_path, folder):
    seen = Compactness()
    trainer(tmp_path, 4, callbacks=[seen]).fit(PANDA("panda_tiny", grad_clip=10.0, ewc_weight=0.0), data(folder))
    share = (seen.points[1] + seen.points[2]) / 2 / seen.points[0]
    detector = PANDA("panda_tiny", grad_clip=10.0, ewc_weight=0.0, schedule=share)
    trainer(tmp_path, 4, limit_val_batches=0).fit(detector, data(folder))
    assert detector.epochs_trained == 2


def test_a_run_that_ends_before_its_schedule_says_so(tmp_path, folder):
    detector = PANDA("panda_tiny", grad_clip=10.0, ewc_weight=0.0, schedule=0.01)
    said = r"Training ended before compactness fell to 0.01 of its start: compactness is .* after 3 steps and was"
    with pytest.warns(UserWarning, match=said):
        trainer(tmp_path, 1).fit(detector, data(folder))


class CountsImages(pl.Callback):
    """Counts the images that enter the network."""

    def __init__(self, monkeypatch):
        self.images = 0
        original = Backbone.normalized

        def counting(backbone, images):
            self.images += len(images)
            return original(backbone, images)

        monkeypatch.setattr(Backbone, "normalized", counting)


@pytest.mark.parametrize("options", [{}, {"prefix_cache_half": True}])
@pytest.mark.parametrize("network", ["panda_tiny", "vit", "eva"])
def test_frozen_layers_see_every_image_once_and_change_no_score(tmp_path, folder, monkeypatch, network, options):
    backbone = network if network == "panda_tiny" else small_network(tmp_path / "net", network)
    plain, cached = Curve(), Curve()
    settings = {"ewc_weight": 0, "grad_clip": 10.0 if network == "panda_tiny" else 0.1}
    off = PANDA(backbone, prefix_cache_gb=0, **settings)
    trainer(tmp_path, 3, callbacks=[plain]).fit(off, data(folder))
    count = CountsImages(monkeypatch)
    trainer(tmp_path, 3, callbacks=[cached]).fit(PANDA(backbone, **settings, **options), data(folder))
    seen = count.images
    assert seen == 11 + 13 + 2  # and one image of each data set to learn the size
    for (x, auroc, scores), (y, expected, reference) in zip(cached.points, plain.points, strict=True):
        assert (x, auroc) == (y, expected)
        torch.testing.assert_close(scores, reference, rtol=2e-2 if options else 1e-5, atol=0)


def test_what_exceeds_the_cache_steps_aside_and_says_so(tmp_path, folder, monkeypatch, caplog):
    count = CountsImages(monkeypatch)
    one = Backbone.pretrained("panda_tiny").prefix(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).numel() * 4
    count.images = 0
    detector = PANDA("panda_tiny", ewc_weight=0, prefix_cache_gb=12 * one / 2**30)  # room for the 11, not for the 13
    with caplog.at_level("INFO"):
        trainer(tmp_path, 1).fit(detector, data(folder))
    assert "output of 11 images is cached" in caplog.text
    assert "output of 13 images would take" in caplog.text
    assert count.images == 11 + 2 + 2 * 13  # test images: at 0 and 1 epochs


def test_the_cache_on_disk_is_found_again_by_the_same_images_only(tmp_path, folder, monkeypatch, caplog):
    cache = tmp_path / "cache"
    in_memory, written, found = (PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0) for _ in range(3))
    written.prefix_cache_dir = found.prefix_cache_dir = str(cache)
    trainer(tmp_path, 2).fit(in_memory, data(folder))
    trainer(tmp_path, 2).fit(written, data(folder))
    count = CountsImages(monkeypatch)
    with caplog.at_level("INFO"):
        trainer(tmp_path, 2).fit(found, data(folder))
    assert count.images == 2  # one of each data set to learn the size
    assert f"in {cache}" in caplog.text
    for detector in (written, found):
        torch.testing.assert_close(detector.scores.score, in_memory.scores.score, rtol=1e-5, atol=0)
    assert len(list(cache.iterdir())) == 2
    picture("stripe", 77).save(folder / "train/spot/000.png")
    trainer(tmp_path, 1).fit(PANDA("panda_tiny", ewc_weight=0, prefix_cache_dir=str(cache)), data(folder))
    assert len(list(cache.iterdir())) == 3


def retuned(folder, **changes):
    """The bundled network in a folder of its own, with another config.json."""
    shutil.copytree(BUNDLED / "panda_tiny", folder, ignore=shutil.ignore_patterns("fisher*"))
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_files_of_the_cache_and_of_fisher_are_of_one_network_and_precision(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    network, cache, found = retuned(tmp_path / "net"), tmp_path / "cache", []

    def changed(file):
        state = load_file(file)
        state["layer1.0.conv1.weight"] += 0.01
        save_file(state, file)

    def run(backbone=network, precision="32-true", **options):
        detector = PANDA(backbone, prefix_cache_dir=str(cache), grad_clip=1.0, **options)
        trainer(tmp_path, 1, precision=precision).fit(detector, data(folder))
        fishers = len(list((tmp_path / "home").rglob("*.safetensors")))
        found.append((len(list(cache.iterdir())), fishers))
        return detector.scores.score

    plain = run()
    torch.testing.assert_close(run(), plain)  # the same files
    run(ewc_weight=0, prefix_cache_half=True)
    run(ewc_weight=0, precision="bf16-mixed")
    run(ewc_weight=0, adapt_stages=1)  # more layers are frozen
    run(retuned(tmp_path / "mean", mean=[0.9, 0.1, 0.1]))
    run(retuned(tmp_path / "std", std=[0.1, 0.5, 0.9]))
    changed(tmp_path / "net/model.safetensors")
    weights = run()
    assert found == [(2, 1), (2, 1), (4, 1), (6, 1), (8, 1), (10, 2), (12, 3), (14, 4)]
    apart = PANDA(network, grad_clip=1.0)
    trainer(tmp_path, 1).fit(apart, data(folder))
    torch.testing.assert_close(weights, apart.scores.score)


def test_a_cut_off_file_of_the_cache_is_made_again(tmp_path, folder):
    cache, found = tmp_path / "cache", []
    for _ in range(2):
        detector = PANDA("panda_tiny", ewc_weight=0, prefix_cache_dir=str(cache))
        trainer(tmp_path, 1).fit(detector, data(folder))
        found.append((detector.scores.score, [path.stat().st_size for path in sorted(cache.iterdir())]))
        for path in cache.iterdir():
            os.truncate(path, 100)
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_a_full_disk_is_no_place_for_the_cache(tmp_path, folder, monkeypatch, caplog):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    detector = PANDA("panda_tiny", ewc_weight=0, prefix_cache_dir=str(tmp_path / "cache"))
    with caplog.at_level("INFO"):
        trainer(tmp_path, 1).fit(detector, data(folder))
    assert "more than is free in prefix_cache_dir (1000 bytes)" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_frozen_layers_of_images_on_disk(tmp_path, folder):
    detector = PANDA("panda_tiny", ewc_weight=0)
    trainer(tmp_path, 1).fit(detector, data(folder, memory_gb=0, num_workers=0))
    inside = PANDA("panda_tiny", ewc_weight=0)
    trainer(tmp_path, 1).fit(inside, data(folder))
    torch.testing.assert_close(detector.scores.score, inside.scores.score, rtol=1e-6, atol=0)


def test_a_fisher_file_that_does_not_fit_is_refused_before_any_work(tmp_path, folder):
    torch.save({"layer9.weight": torch.ones(1)}, tmp_path / "f.pth")
    module = data(folder)
    with pytest.raises(PandaError, match=r"f.pth does not fit resnet10t: layer3.*is missing"):
        trainer(tmp_path).fit(PANDA("panda_tiny", fisher=str(tmp_path / "f.pth")), module)
    assert not module.decoded
