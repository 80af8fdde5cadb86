import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from panda_lightning.callbacks import report


@pytest.mark.parametrize("epochs", [0, 1, 5])
@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 1], [1] * 5])
def test_the_picture_has_a_panel_for_everything_there_is(tmp_path, epochs, labels):
    rows = [{"epochs_trained": float(e), "val/auroc": 0.9 + e / 100} for e in range(epochs)]
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0, 1e6])
    report.draw(tmp_path / "report.png", scores, torch.tensor(labels), rows)
    image = np.asarray(Image.open(tmp_path / "report.png").convert("L"))
    width = 1430 if epochs > 1 else 990
    assert image.shape == (440, width)
    for panel in np.array_split(image, 3 if epochs > 1 else 2, axis=1):
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
