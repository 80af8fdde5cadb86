import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from panda_lightning import SPADE, AutoWandbLogger, ImageFolder, PatchCore
from panda_lightning.callbacks import anomaly_maps
from panda_lightning.types import Scores
from tests.callbacks.test_media import inspect
from tests.conftest import fast, make_mixed
from tests.datamodules.official import make_mvtec
from tests.detectors.test_segmentation import mvtec, trainer

pytestmark = pytest.mark.pictures


def test_the_worst_come_first_and_are_what_was_scored(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(anomaly_maps, "draw", lambda path, panels, *rest: shown.append((panels, *rest)))
    monkeypatch.setattr(anomaly_maps.AnomalyMaps, "ROWS", 3)
    detector, module = SPADE("panda_tiny", k=2), mvtec(tmp_path)
    trainer(tmp_path).test(detector, module, verbose=False)
    ((panels, value_range, threshold, title),) = shown
    assert title == "MVTecAD, bottle, normal: good, SPADE, panda_tiny"
    maps = torch.cat([detector.predict_step(b, 0)["map"] for b in module.test_dataloader()])
    masks = torch.cat([b["mask"] for b in module.test_dataloader()])
    inside = [float(m[mask].mean()) for m, mask in zip(maps[:4], masks[:4], strict=True)]  # broken sorts before good
    scores = detector.scores.score.tolist()
    misses, alarms = np.argsort(inside)[:3], 4 + np.argsort(scores[4:])[::-1][:3]
    names = [p.title.split("\n")[0] for p in panels]
    assert names == [f"broken/{i:03d}.png" for i in misses] + [f"good/{i - 4:03d}.png" for i in alarms]
    for panel, i in zip(panels, [*misses, *alarms], strict=True):
        np.testing.assert_allclose(panel.map, maps[i], rtol=1e-4)
        np.testing.assert_array_equal(panel.mask, masks[i])
        assert panel.anomalous == (i < 4)
        assert panel.title.split("\n")[1].startswith(f"score {scores[i]:.4g}")
    assert value_range == pytest.approx((float(maps.min()), float(maps.max())), rel=1e-4)
    assert threshold == detector.pixel_metrics.threshold


def test_an_image_is_called_a_miss_only_where_it_is_one():
    scores = Scores(torch.arange(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0]), torch.tensor([0, 1, 0, 1, 0]))
    said = [anomaly_maps.verdict(float(s), bool(y), scores) for s, y in zip(scores.score, scores.label, strict=True)]
    assert said == [
        "score 1",
        "score 2, missed: 2 of 3 normal images score higher",
        "score 3, false alarm: 1 of 2 anomalous images score lower",
        "score 4",
        "score 4, false alarm: 1 of 2 anomalous images score lower",
    ]


def test_wandb_gets_images_with_their_masks(run, workdir):
    make_mvtec(workdir / "data")
    words = [w for w in fast(workdir / "data", model="SPADE") if not w.startswith(("--trainer.logger", "--data"))]
    words += ["--trainer.logger=[{class_path: CSVLogger, init_args: {save_dir: runs, name: t}}, AutoWandbLogger]"]
    words += ["--model.k=2", "--data=MVTecAD", f"--data.root={workdir / 'data'}", "--data.image_size=32"]
    run("test", *words)
    import wandb

    wandb.finish()
    (path,) = (workdir / "runs/wandb").glob("offline-run-*/*.wandb")
    assert "images/maps" in str(inspect(path))
    assert list(path.parent.rglob("*.mask.png"))


def test_wandb_gets_images_of_several_sizes_as_one(workdir, caplog):
    make_mixed(workdir / "images")
    options = {"normal_class": "spot", "crop": "none", "image_size": 32}
    data = ImageFolder(root=str(workdir / "images"), **options)
    run = pl.Trainer(accelerator="cpu", logger=AutoWandbLogger(save_dir="runs"), enable_progress_bar=False)
    run.test(PatchCore("panda_tiny", coreset=0.5), data, verbose=False)
    assert "Images sizes do not match" not in caplog.text  # which W&B says of a list
    files = list((workdir / "runs").rglob("media/images/images/*.png"))
    assert {Image.open(file).size for file in files} == {(64, 45)}  # of 32 x 32, 64 x 32 and 32 x 45
