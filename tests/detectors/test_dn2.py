import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from panda_lightning import DN2, Backbone, ImageFolder, PandaError
from panda_lightning.detectors import checks


def trainer(tmp_path, **options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip


def data(folder, **options):
    return ImageFolder(
        root=str(folder), normal_class="spot", image_size=32, crop="squash", eval_batch_size=4, **options
    )


@torch.no_grad()
def features(loader):
    backbone = Backbone.pretrained("panda_tiny")
    batches = list(loader)
    return np.concatenate([backbone(b["image"]).double().numpy() for b in batches])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_score_is_the_sum_of_the_k_nearest_squared_distances(tmp_path, folder, k, normalize):
    module, detector = data(folder), DN2("panda_tiny", k=k, normalize=normalize)
    (result,) = trainer(tmp_path).test(detector, module, verbose=False)
    bank, queries = features(module.normal_dataloader()), features(module.test_dataloader())
    if normalize:
        bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    expected = np.sort(((queries[:, None] - bank[None]) ** 2).sum(axis=2), axis=1)[:, :k].sum(axis=1)
    np.testing.assert_allclose(detector.scores.score, expected, rtol=1e-4)
    labels = np.array([0] * 7 + [1] * 6)
    np.testing.assert_array_equal(detector.scores.label, labels)
    assert result["test/auroc"] == pytest.approx(roc_auc_score(labels, detector.scores.score), abs=1e-9)


def test_centroids_stand_for_the_bank(tmp_path, folder):
    module, detector = data(folder), DN2("panda_tiny", k=1, centroids=4)
    trainer(tmp_path).test(detector, module, verbose=False)
    bank, queries = features(module.normal_dataloader()), features(module.test_dataloader())
    assert len(detector.index) == 4
    assert detector.bank.shape == (11, 256)  # which stays: another number of centroids needs no images
    nearest = np.linalg.norm(bank[:, None] - detector.entries().numpy(), axis=2)
    members = nearest.argmin(axis=1)
    centres = np.stack([bank[members == c].mean(axis=0) for c in range(4)])  # k-means: each the mean of its images
    expected = ((queries[:, None] - centres[None]) ** 2).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(detector.scores.score, expected, rtol=1e-3)
    assert detector.normal_score() == pytest.approx((nearest.min(axis=1) ** 2).mean(), rel=1e-3)
    with pytest.raises(PandaError, match="centroids=1 are fewer than k=2 neighbours: choose 2 or more"):
        DN2("panda_tiny", centroids=1)


def test_fit_is_refused_in_a_sentence(tmp_path, folder):
    with pytest.raises(PandaError, match="DN2 has nothing to train: run `lightning test`"):
        trainer(tmp_path, max_epochs=1).fit(DN2("panda_tiny"), data(folder))


def test_a_bare_data_module_is_refused_in_a_sentence(tmp_path):
    class Bare(pl.LightningDataModule):
        def test_dataloader(self):
            return []

    with pytest.raises(PandaError, match=r"needs an AnomalyDataModule, whose normal_dataloader\(\).*got Bare"):
        trainer(tmp_path).test(DN2("panda_tiny"), Bare())


def test_images_below_the_stride_are_refused(tmp_path, folder):
    module = ImageFolder(root=str(folder), normal_class="spot", image_size=16)
    with pytest.raises(PandaError, match="image_size=16 is smaller than the stride of resnet10t: choose 32 or more"):
        trainer(tmp_path).test(DN2("panda_tiny"), module)


def test_k_beyond_the_bank_is_refused(tmp_path, folder):
    with pytest.raises(PandaError, match="k=12 .* choose 1 to 11"):
        trainer(tmp_path).test(DN2("panda_tiny", k=12), data(folder))


def test_predict_gives_index_and_score(tmp_path, folder):
    detector, module = DN2("panda_tiny"), data(folder)
    outputs = trainer(tmp_path).predict(detector, module)
    index = torch.cat([o["index"] for o in outputs])
    scores = torch.cat([o["score"] for o in outputs])
    trainer(tmp_path).test(detector, module, verbose=False)
    assert torch.equal(index, torch.arange(13))
    torch.testing.assert_close(scores.cpu(), detector.scores.score)


def test_scores_that_are_no_numbers_end_the_run(tmp_path, folder):
    class Broken(DN2):
        def load_backbone(self):
            super().load_backbone()
            nn.init.constant_(self.backbone.model.layer4[0].bn2.weight, float("nan"))

    with pytest.raises(PandaError, match="13 of 13 anomaly scores are NaN or infinite"):
        trainer(tmp_path).test(Broken("panda_tiny"), data(folder))


def test_a_bank_that_does_not_fit_is_refused_before_images_are_decoded(tmp_path, folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    one = 8 * 256  # bytes of an image in bank and index

    def tested(memory, **options):
        monkeypatch.setattr(checks, "memory_of", lambda device: memory)
        caplog.clear()
        detector = DN2("panda_tiny", **options)
        trainer(tmp_path).test(detector, data(folder), verbose=False)
        return detector

    said = "the bank of 11 normal images with 256 features"
    for options, cure in (({}, r", or model\.shard_bank=true with more processes\."), ({"centroids": 4}, r"\.")):
        with pytest.raises(
            PandaError, match=rf"{said} takes 22\.0 KiB on cpu .* 8\.0 KiB .* data\.train_limit=4{cure}$"
        ):
            tested((4 * one, 1000 * one), **options)
        assert "decoded" not in caplog.text
    with pytest.raises(PandaError, match=r"but 0 bytes are free: set a smaller data\.train_limit"):
        tested((0, 1000 * one))
    detector = tested((11 * one, 109 * one))
    assert f"DN2: {said} will take 22.0 KiB of the" in caplog.text
    for memory in ((11 * one, 110 * one), None):
        tested(memory)
        assert "will take" not in caplog.text
    monkeypatch.setattr(checks, "memory_of", lambda device: (0, 1))
    trainer(tmp_path).test(detector, data(folder), verbose=False)  # which has its bank
