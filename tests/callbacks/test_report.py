import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from panda_lightning import PANDA, ImageFolder
from panda_lightning.callbacks import report


@pytest.mark.parametrize("epochs", [0, 1, 5])
@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 1], [1] * 5])
def test_the_picture_has_a_panel_for_everything_there_is(tmp_path, epochs, labels):
    rows = [{"epochs_trained": float(e), "val/auroc": 0.9 + e / 100} for e in range(epochs)]
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0, 1e6])
    report.draw(tmp_path / "report.png", scores, torch.tensor(labels), rows)
    image = np.asarray(Image.open(tmp_path / "report.png").convert("L"))
    panels = (3 if epochs > 1 else 2) if 0 in labels else 1
    assert image.shape == (440, {1: 550, 2: 990, 3: 1430}[panels])
    for panel in np.array_split(image, panels, axis=1):
        assert (panel < 128).mean() > 0.005  # each has ink


def test_constant_scores_can_be_drawn(tmp_path):
    report.draw(tmp_path / "report.png", torch.ones(4), torch.tensor([0, 1, 0, 1]), [])
    assert (tmp_path / "report.png").is_file()


def test_the_roc_curve_says_what_its_number_is(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    report.draw(tmp_path / "report.png", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), [], "AUROC, oracle")
    histogram, roc = drawn[0].axes
    assert [t.get_text() for t in roc.get_legend().get_texts()] == ["AUROC, oracle 1.0000"]
    assert [t.get_text() for t in histogram.get_legend().get_texts()] == ["normal (2)", "anomalous (1)"]


def fit(tmp_path, folder, epochs, version, ckpt_path=None, callbacks=()):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False,
        logger=CSVLogger(tmp_path, name="t", version=version), num_sanity_val_steps=0,
        callbacks=[*callbacks, ModelCheckpoint(tmp_path / "ck", filename="last", enable_version_counter=False)],
    )  # fmt: skip
    data = ImageFolder(root=str(folder), normal_class="spot", image_size=32, crop="squash", batch_size=4)
    trainer.fit(PANDA("panda_tiny", ewc_weight=0, grad_clip=1.0), data, ckpt_path=ckpt_path)
    return data


@pytest.mark.pictures
def test_a_run_that_died_before_its_report_makes_it_when_it_goes_on(tmp_path, folder, capsys):
    class Dies(pl.Callback):
        def on_fit_end(self, trainer, pl_module):  # after the last checkpoint
            raise KeyboardInterrupt

        on_train_end = on_fit_end

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, folder, 2, 0, callbacks=[Dies()])
    (tmp_path / "t/version_0/report.png").unlink(missing_ok=True)
    capsys.readouterr()
    fit(tmp_path, folder, 2, 1, tmp_path / "ck/last.ckpt")
    assert "after 2 epochs" in capsys.readouterr().out
    assert (tmp_path / "t/version_1/report.png").is_file()


def test_a_test_reports_itself_and_not_the_fit(tmp_path, folder, capsys):
    data = fit(tmp_path, folder, 1, 0)
    capsys.readouterr()
    tester = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    detector = PANDA("panda_tiny", ewc_weight=0)
    tester.test(detector, data, ckpt_path=tmp_path / "ck/last.ckpt", verbose=False)
    out = capsys.readouterr().out
    assert f"AUROC {float(tester.callback_metrics['test/auroc']):.4f} of 13 images by PANDA-Early" in out
    assert "epochs" not in out
    tester.predict(detector, data)
    assert "AUROC" not in capsys.readouterr().out  # nothing was compared with labels
