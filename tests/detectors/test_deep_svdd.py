import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

from panda_lightning import DeepSVDD, PandaError
from panda_lightning.callbacks import Report
from tests.detectors.test_panda import data, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rates_range_and_score_are_the_papers(folder, tmp_path):
    log = []

    class Watched(DeepSVDD):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            log.append((self.current_epoch, float(loss), self.trainer.optimizers[0].param_groups[0]["lr"]))
            return loss

    detector = Watched(pretrain_epochs=3, pretrain_milestone=2, milestone=1, lr=1e-3)
    module = data(folder)
    trainer(tmp_path, epochs=5).fit(detector, module)
    rates = {epoch: rate for epoch, _, rate in log}
    assert rates == pytest.approx({0: 1e-3, 1: 1e-3, 2: 1e-4, 3: 1e-3, 4: 1e-4})
    train = module.normal_dataloader().dataset.pixels.numpy().astype(float)
    centred = train - train.mean(axis=(1, 2, 3), keepdims=True)
    gcn = centred / np.abs(centred).mean(axis=(1, 2, 3), keepdims=True)
    assert detector.range == pytest.approx((gcn.min(), gcn.max()), rel=1e-4)
    assert detector.centre.shape == (128,)
    assert detector.centre.abs().min() >= 0.0999
    with torch.no_grad():
        x = torch.tensor((gcn - gcn.min()) / (gcn.max() - gcn.min()), dtype=torch.float32)
        detector.eval()
        expected = ((detector.encoder(x).numpy() - detector.centre.numpy()) ** 2).sum(axis=1)
        got = detector.anomaly_score(module.normal_dataloader().dataset.__getitems__(range(11)))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_the_centre_is_the_mean_of_the_pretrained_encoder_pushed_off_zero(folder, tmp_path):
    detector = DeepSVDD(pretrain_epochs=0, lr=0.0)  # so that the encoder stays what it was
    module = data(folder)
    trainer(tmp_path, epochs=1).fit(detector, module)
    fresh = DeepSVDD(pretrain_epochs=0, lr=0.0)
    fresh.build(32)
    fresh.range = detector.range
    fresh.encoder.load_state_dict(detector.encoder.state_dict())
    for name, buffer in fresh.encoder.named_buffers():  # as they were before the epoch: no image seen
        buffer.fill_(1.0 if name.endswith("var") else 0.0)
    fresh.eval()
    with torch.no_grad():
        mean = fresh.embed(module.normal_dataloader().dataset.__getitems__(range(11))).mean(dim=0).numpy()
    expected = np.where(np.abs(mean) < 0.1, np.where(mean < 0, -0.1, 0.1), mean)
    np.testing.assert_allclose(detector.centre, expected, rtol=1e-3, atol=1e-4)


def test_the_soft_boundary_becomes_the_quantile_after_the_warm_up(folder, tmp_path):
    seen = []

    class Watched(DeepSVDD):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append((self.current_epoch, float(self.radius)))
            return loss

        def distance(self, batch):
            self.last = super().distance(batch)
            return self.last

    detector = Watched(boundary="soft", nu=0.25, warm_up=1, pretrain_epochs=0)
    trainer(tmp_path, epochs=2).fit(detector, data(folder, batch_size=11))
    assert [r for epoch, r in seen if epoch == 0] == [0.0]
    assert len(seen) == 2
    assert seen[1][1] > 0
    score = detector.anomaly_score(data_batch(folder))
    torch.testing.assert_close(score, detector.last - detector.radius**2)


def data_batch(folder):
    module = data(folder)
    module.setup("fit")
    return module.normal_dataloader().dataset.__getitems__(range(11))


@pytest.mark.parametrize("stop", [2, 3, 4])  # in the first phase, between the two, in the second
def test_a_resumed_run_is_the_undisturbed_one(folder, tmp_path, stop):
    options = {"boundary": "soft", "warm_up": 1, "pretrain_epochs": 3, "pretrain_milestone": 2, "milestone": 1}

    def run(epochs, path=None):
        torch.manual_seed(0)
        detector = DeepSVDD(**options)
        saved = ModelCheckpoint(dirpath=tmp_path / f"{epochs}-{path is None}", filename="last")
        fit = trainer(tmp_path, epochs, enable_checkpointing=True, callbacks=[saved])
        fit.fit(detector, data(folder), ckpt_path=path)
        return detector, saved.best_model_path

    whole, _ = run(6)
    _, path = run(stop)
    resumed, _ = run(6, path)
    torch.testing.assert_close(resumed.scores.score, whole.scores.score, rtol=1e-4, atol=1e-5)
    again = DeepSVDD.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert (again.centre is None) == (stop < 4)


def test_after_a_resume_from_the_first_phases_last_step_comes_the_second(folder, tmp_path):
    def run(path=None):
        torch.manual_seed(0)
        detector = DeepSVDD(pretrain_epochs=1, pretrain_milestone=1, lr=1e-3)
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1 if path is None else 0)
        fit = trainer(tmp_path, 3, enable_checkpointing=True, callbacks=[saved])
        fit.fit(detector, data(folder), ckpt_path=path)
        return detector

    whole, resumed = run(), run(tmp_path / "step=3.ckpt")  # an epoch has three
    assert torch.equal(resumed.centre, whole.centre)
    assert torch.equal(resumed.scores.score, whole.scores.score)


def test_what_does_not_fit_is_said(folder, tmp_path):
    with pytest.raises(PandaError, match="image_size=40 does not suit network=auto: choose 28"):
        trainer(tmp_path).fit(DeepSVDD(), data(folder, image_size=40))
    with pytest.warns(UserWarning, match="max_epochs=1 only trains the autoencoder .pretrain_epochs=350"):
        trainer(tmp_path, epochs=1).fit(DeepSVDD(), data(folder))
    for path in folder.rglob("*.png"):
        Image.new("L", (32, 32), 90).save(path)
    with pytest.raises(PandaError, match="normal training images have one flat colour"):
        trainer(tmp_path, epochs=1).fit(DeepSVDD(pretrain_epochs=1), data(folder))


@pytest.mark.parametrize(
    ("place", "spread", "alarm"),
    [
        (0.0, 0.0, "same anomaly score"),  # far from the centre, all at one place
        (0.0, 1e-6, "same anomaly score"),
        (1.0, 1e-4, "collapsed to a point"),  # all at the centre, where scores still differ by large factors
        (1.0, 1e-1, None),
    ],
)
def test_collapse_to_a_point_is_an_alarm(folder, tmp_path, recwarn, place, spread, alarm):
    class Collapsed(DeepSVDD):
        def distance(self, batch):
            offset = torch.randn(len(batch["image"]), 128) * spread
            representation = (place + offset) * self.centre + 0 * super().embed(batch)
            return (representation - self.centre).square().sum(dim=1)

    trainer(tmp_path, epochs=1).fit(Collapsed(pretrain_epochs=0), data(folder))
    said = [str(w.message) for w in recwarn if "collapsed" in str(w.message)]
    assert len(said) == (alarm is not None)
    assert alarm is None or alarm in said[0]


def test_the_autoencoders_auroc_is_not_deep_svdds(folder, tmp_path, capsys):
    """Scores of the two mean different things: the best epoch is one of Deep SVDD's, and its curve begins there."""
    run = trainer(tmp_path, epochs=4)
    run.fit(DeepSVDD(pretrain_epochs=2, lr=1e-3), data(folder))
    rows = next(c for c in run.callbacks if isinstance(c, Report)).rows
    names = [[key for key in row if key.startswith("val/auroc")] for row in rows]
    assert names == [["val/auroc_autoencoder"]] * 2 + [["val/auroc"]] * 2
    aurocs = [row["val/auroc"] for row in rows[2:]]
    told = f"AUROC {aurocs[1]:.4f} after 4 epochs, {aurocs[0]:.4f} after 3 (best epoch by test labels, oracle: "
    assert f"{told}{max(aurocs):.4f})" in capsys.readouterr().out
