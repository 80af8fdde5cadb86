import logging

import numpy as np
import pytest
import torch

from panda_lightning import DN2, PANDA, PANDAOE, Backbone, PandaError
from tests.conftest import make_clouds
from tests.detectors.test_panda import data, trainer


@pytest.fixture
def outliers(tmp_path):
    return str(make_clouds(tmp_path / "others", 3))


@pytest.fixture
def many(tmp_path):
    return str(make_clouds(tmp_path / "others", 40))


def test_training_is_a_plain_loop(folder, tmp_path, many):
    detector, module = PANDAOE("panda_tiny"), data(folder, outliers=many)
    batches, head = [], {}

    class Kept(PANDAOE):
        def on_train_start(self):
            super().on_train_start()
            head.update({name: p.detach().clone() for name, p in self.head.named_parameters()})

        def training_step(self, batch, batch_idx):
            batches.append({name: part["index"] for name, part in batch.items()})
            assert not batch["normal"]["label"].any()
            assert batch["outlier"]["label"].all()
            return super().training_step(batch, batch_idx)

    detector = Kept("panda_tiny")
    trainer(tmp_path).fit(detector, module)
    assert [len(b["normal"]) for b in batches] == [4, 4, 3, 4, 4, 3]  # an epoch is the normal images, once
    assert all(len(b["outlier"]) == 4 for b in batches)
    again = data(folder, outliers=many)
    again.setup("fit")
    taken = np.linspace(0, 39, 2 * 3 * 4).round().astype(int)  # as many as the steps take
    images = {
        "normal": again.normal_dataloader().dataset.pixels,
        "outlier": again.outlier_dataloader().dataset.pixels[taken],
    }
    backbone = Backbone.pretrained("panda_tiny")
    params = [*backbone.adapted().values(), head["weight"].requires_grad_(), head["bias"].requires_grad_()]
    start, velocity = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    for batch in batches:
        loss, n = torch.zeros(()), sum(len(rows) for rows in batch.values())
        for kind, rows in batch.items():
            logit = backbone(images[kind][rows]) @ head["weight"][0] + head["bias"]
            chance = 1 / (1 + torch.exp(-logit))
            loss = loss - torch.log(chance if kind == "outlier" else 1 - chance).sum() / n
        gradients = torch.autograd.grad(loss, params)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        with torch.no_grad():
            for i, g in enumerate(gradients):
                velocity[i] = 0.9 * velocity[i] + g * min(1.0, 1e-3 / (norm + 1e-6))
                params[i] -= 0.1 * velocity[i]
    got = [*detector.backbone.adapted().values(), detector.head.weight, detector.head.bias]
    for ours, theirs, before in zip(got, params, start, strict=True):
        assert (ours - theirs).norm() < 0.01 * (theirs - before).norm()


def test_no_more_outliers_are_read_than_the_steps_take(folder, tmp_path, many, caplog):
    caplog.set_level(logging.INFO)
    module = data(folder, outliers=many)
    trainer(tmp_path, epochs=1).fit(PANDAOE("panda_tiny"), module)
    assert "This run's steps need only 12 of 40 outliers" in caplog.text
    assert len(module.decoded["outlier"][1].pixels) == 12
    trainer(tmp_path / "long", epochs=4).fit(PANDAOE("panda_tiny"), module)
    assert len(module.decoded["outlier"][1].pixels) == 40


def test_few_outliers_come_again_within_an_epoch(folder, tmp_path, outliers):
    module = data(folder, outliers=outliers, batch_size=2)
    detector = PANDAOE("panda_tiny")
    trainer(tmp_path, epochs=1).fit(detector, module)
    assert detector.steps_trained == 6  # eleven images by two, though there are three outliers


def test_the_score_is_the_logit_also_from_a_checkpoint(folder, tmp_path, many):
    module, fit = data(folder, outliers=many), trainer(tmp_path, epochs=1)
    detector = PANDAOE("panda_tiny")
    fit.fit(detector, module)
    fit.save_checkpoint(tmp_path / "oe.ckpt")
    again = PANDAOE.load_from_checkpoint(tmp_path / "oe.ckpt", map_location="cpu", weights_only=True)
    pixels = data(folder)
    pixels.setup("test")
    batch = pixels.test_dataloader().dataset.__getitems__(range(13))
    with torch.no_grad():
        expected = again.backbone(batch["image"]) @ again.head.weight[0] + again.head.bias
        torch.testing.assert_close(again.anomaly_score(batch), expected)
    torch.testing.assert_close(detector.scores.score, expected.detach(), rtol=1e-4, atol=1e-4)
    assert "bank" not in torch.load(tmp_path / "oe.ckpt", weights_only=True)["state_dict"]["_extra_state"]["derived"]


def test_outliers_are_asked_for_and_refused_in_a_sentence(folder, tmp_path, many):
    with pytest.raises(PandaError, match=r"outlier exposure needs images .* set data.outliers"):
        trainer(tmp_path).fit(PANDAOE("panda_tiny"), module := data(folder))
    assert not module.decoded  # it is said before any work
    with pytest.raises(PandaError, match=r"would be ignored, because PANDA-EWC learns only from normal images"):
        trainer(tmp_path).fit(PANDA("panda_tiny"), data(folder, outliers=many))
    trainer(tmp_path).test(DN2("panda_tiny"), data(folder, outliers=many), verbose=False)  # scoring needs none
