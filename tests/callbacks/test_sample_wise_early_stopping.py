import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from sklearn.metrics import roc_auc_score

from panda_lightning import PANDA, ImageFolder, PandaError, SampleWiseEarlyStopping
from panda_lightning.runtime.gathering import gather

pytestmark = pytest.mark.usefixtures("one_thread")


class Kept(pl.Callback):
    """Scores, bank and AUROC of SES at each validation."""

    def __init__(self):
        self.scores, self.banks, self.aurocs = [], [], []

    def on_validation_end(self, trainer, pl_module):
        self.scores.append(pl_module.scores.score.clone())
        self.banks.append(pl_module.bank.clone())
        self.aurocs.append(float(trainer.callback_metrics["val/auroc_ses"]))


def trainer(tmp_path, epochs, *callbacks):
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, logger=False,
        default_root_dir=tmp_path, num_sanity_val_steps=0, callbacks=list(callbacks),
    )  # fmt: skip


def data(folder):
    return ImageFolder(
        root=str(folder), normal_class="spot", image_size=32, crop="squash", batch_size=4, eval_batch_size=4
    )


def normal_mean(bank, k):
    """By a plain loop: each image against all others."""
    bank = bank.double().numpy()
    means = []
    for i, x in enumerate(bank):
        distances = sorted(((x - y) ** 2).sum() for j, y in enumerate(bank) if j != i)
        means.append(sum(distances[:k]))
    return np.mean(means)


def checkpoint(tmp_path):
    return ModelCheckpoint(tmp_path / "ck", filename="last", enable_version_counter=False)


@pytest.mark.parametrize("normalize", [False, True])
def test_ses_is_the_direct_computation_from_the_scores_of_each_epoch(tmp_path, folder, normalize):
    ses, kept = SampleWiseEarlyStopping(), Kept()
    detector = PANDA("panda_tiny", ewc_weight=0, grad_clip=10.0, lr=0.1, normalize=normalize)
    trainer(tmp_path, 3, ses, kept, checkpoint(tmp_path)).fit(detector, data(folder))
    best, label = None, detector.scores.label.numpy()
    for scores, bank, auroc in zip(kept.scores, kept.banks, kept.aurocs, strict=True):
        space = torch.nn.functional.normalize(bank, dim=1) if normalize else bank
        relative = scores.double().numpy() / normal_mean(space, 2)
        best = relative if best is None else np.maximum(best, relative)
        assert auroc == pytest.approx(roc_auc_score(label, best))
    np.testing.assert_allclose(ses.score.numpy(), best, rtol=1e-4)
    assert len(kept.scores) == 4
    assert not (tmp_path / "ck/ses").exists()


def test_copies_in_the_bank_do_not_hide_an_image_from_itself():
    detector = PANDA("panda_tiny", k=2)
    detector.bank = torch.tensor([[0.0, 0.0]] * 5 + [[3.0, 4.0]])
    detector.fit_index()
    assert detector.normal_score() == pytest.approx(50 / 6)


@pytest.mark.parametrize("place", ["part", "rest"])  # as versions of a log are
def test_snapshots_score_new_images_and_survive_a_resume(tmp_path, folder, caplog, place):
    settings = {"ewc_weight": 0, "grad_clip": 10.0, "lr": 0.1}
    whole = SampleWiseEarlyStopping(keep_snapshots=True)
    caplog.set_level("INFO")
    trainer(tmp_path, 3, whole, checkpoint(tmp_path / "whole")).fit(PANDA("panda_tiny", **settings), data(folder))
    assert "SES saves" in caplog.text
    assert len(list((tmp_path / "whole/ck/ses").glob("*/*.ckpt"))) == 4

    part, resumed = (SampleWiseEarlyStopping(keep_snapshots=True) for _ in range(2))
    trainer(tmp_path, 2, part, checkpoint(tmp_path / "part")).fit(PANDA("panda_tiny", **settings), data(folder))
    path = tmp_path / "part/ck/last.ckpt"
    last = trainer(tmp_path, 3, resumed, checkpoint(tmp_path / place))
    last.fit(PANDA("panda_tiny", **settings), data(folder), ckpt_path=path)
    path = tmp_path / place / "ck/last.ckpt"
    torch.testing.assert_close(resumed.score, whole.score, rtol=1e-4, atol=1e-6)

    again = SampleWiseEarlyStopping()
    tester = trainer(tmp_path, 1, again)
    tester.test(PANDA("panda_tiny", **settings), data(folder), ckpt_path=path, verbose=False)
    torch.testing.assert_close(gather(again._parts)[1], whole.score, rtol=1e-4, atol=1e-6)
    expected = roc_auc_score(tester.lightning_module.scores.label, whole.score)
    assert float(tester.callback_metrics["test/auroc_ses"]) == pytest.approx(expected)

    predicted = trainer(tmp_path, 1, SampleWiseEarlyStopping()).predict(
        PANDA("panda_tiny", **settings), data(folder), ckpt_path=path
    )
    torch.testing.assert_close(torch.cat([p["ses_score"] for p in predicted]), whole.score, rtol=1e-4, atol=1e-6)


def test_without_snapshots_new_images_are_refused(tmp_path, folder):
    trainer(tmp_path, 1, SampleWiseEarlyStopping(), checkpoint(tmp_path)).fit(
        PANDA("panda_tiny", ewc_weight=0), data(folder)
    )
    with pytest.raises(PandaError, match="there are none of .*last.ckpt: train with keep_snapshots: true"):
        trainer(tmp_path, 1, SampleWiseEarlyStopping()).test(
            PANDA("panda_tiny", ewc_weight=0), data(folder), ckpt_path=tmp_path / "ck/last.ckpt"
        )


@pytest.mark.parametrize("options", [{}, {"centroids": 3}], ids=str)
def test_fit_and_test_agree_also_with_centroids_and_after_another_run_in_the_folder(tmp_path, folder, options):
    settings = {"ewc_weight": 0, "grad_clip": 10.0, "lr": 0.1, **options}

    def run(epochs, seed):
        ses = SampleWiseEarlyStopping(keep_snapshots=True)
        module = data(folder)
        module.seed = seed
        trainer(tmp_path, epochs, ses, checkpoint(tmp_path)).fit(PANDA("panda_tiny", **settings), module)
        again = SampleWiseEarlyStopping()
        trainer(tmp_path, 1, again).test(
            PANDA("panda_tiny", **settings), data(folder), ckpt_path=tmp_path / "ck/last.ckpt", verbose=False
        )
        torch.testing.assert_close(gather(again._parts)[1], ses.score, rtol=1e-4, atol=1e-6)

    run(3, seed=0)
    run(1, seed=1)
    assert len(list((tmp_path / "ck/ses").iterdir())) == 2  # both runs can still be tested


def test_a_lost_snapshot_is_named(tmp_path, folder):
    ses = SampleWiseEarlyStopping(keep_snapshots=True)
    trainer(tmp_path, 1, ses, checkpoint(tmp_path)).fit(PANDA("panda_tiny", ewc_weight=0), data(folder))
    next((tmp_path / "ck/ses").glob("*/00000003.ckpt")).unlink()
    with pytest.raises(PandaError, match="00000003.ckpt is missing"):
        trainer(tmp_path, 1, SampleWiseEarlyStopping()).test(
            PANDA("panda_tiny", ewc_weight=0), data(folder), ckpt_path=tmp_path / "ck/last.ckpt"
        )


@pytest.mark.parametrize("first", [True, False])
def test_snapshots_are_of_the_averaged_weights_that_score(tmp_path, folder, first):
    ses, average = SampleWiseEarlyStopping(keep_snapshots=True), EMAWeightAveraging(decay=0.5)
    both = [ses, average] if first else [average, ses]
    settings = {"ewc_weight": 0, "grad_clip": 10.0, "lr": 0.1}
    trainer(tmp_path, 2, *both, checkpoint(tmp_path)).fit(PANDA("panda_tiny", **settings), data(folder))
    again = SampleWiseEarlyStopping()
    trainer(tmp_path, 1, again).test(
        PANDA("panda_tiny", **settings), data(folder), ckpt_path=tmp_path / "ck/last.ckpt", verbose=False
    )
    torch.testing.assert_close(gather(again._parts)[1], ses.score, rtol=1e-4, atol=1e-6)
