import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning import Backbone, LabelledFolder, PandaError, Pretraining
from tests.conftest import picture


@pytest.fixture
def tiny(tmp_path):
    """Two classes in the official layout of Tiny-ImageNet."""
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    (root / "val/images").mkdir(parents=True)
    for name, kind in (("n01", "spot"), ("n02", "stripe")):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(20):
            picture(kind, i, 24).save(root / "train" / name / "images" / f"{name}_{i}.JPEG")
        for i in range(5):
            picture(kind, 100 + i, 24).save(root / "val/images" / f"val_{name}_{i}.JPEG")
            lines.append(f"val_{name}_{i}.JPEG\t{name}\t0\t0\t23\t23")
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


CONFIG = Path(__file__).parents[2] / "conf/pretrain_tiny.yaml"
SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.model_args={channels: [8, 8, 16, 16], stem_width: 8}",
    "--model.lr=0.1",
    "--data.image_size=32",
    "--data.batch_size=8",
]


def test_a_network_is_trained_written_and_loaded(run, tiny, workdir, caplog):
    caplog.set_level("INFO")
    run("fit", "--config", CONFIG, *SMALL, f"--data.root={tiny}", "--model.teacher=null",
               "--trainer.max_epochs=6")  # fmt: skip
    folder = workdir / "runs/pretrain_tiny/version_0/backbone"
    assert "--model.backbone local-dir:" in caplog.text
    made = json.loads((folder / "config.json").read_text())
    assert made["pretrained_cfg"]["label_names"] == ["n01", "n02"]
    assert made["training"]["epochs"] == 6
    assert made["training"]["val_accuracy"] > 0.8
    backbone = Backbone.pretrained(f"local-dir:{folder}")
    spots = np.stack([np.asarray(picture("spot", 300 + i, 32)) for i in range(8)])
    logits = backbone.logits(backbone.prefix(torch.from_numpy(spots).permute(0, 3, 1, 2)))
    assert (logits.argmax(dim=1) == 0).float().mean() > 0.7


def test_a_teachers_features_are_learned(run, tiny, workdir):
    run("fit", "--config", CONFIG, *SMALL, f"--data.root={tiny}", "--model.teacher=panda_tiny",
        "--model.teacher_size=64", "--trainer.max_epochs=6")  # fmt: skip
    lines = (workdir / "runs/pretrain_tiny/version_0/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/teacher")
    values = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert values[-1] < values[0] < 1.5  # standardised targets: their mean has an error of 1
    kept = torch.load(workdir / "runs/pretrain_tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in kept["state_dict"])


def test_augmentation_keeps_size_and_moves_pixels():
    torch.manual_seed(0)
    module = Pretraining(zoom=1.4, jitter=0.0)
    module.mean, module.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    images = torch.from_numpy(np.asarray(picture("stripe", 1, 48))).permute(2, 0, 1).expand(64, 3, 48, 48).contiguous()
    out = module.augment(images)
    assert out.shape == images.shape
    assert 0 <= out.min() <= out.max() <= 1
    assert len(torch.unique(out[:, 0, 0, 0])) > 50
    still = Pretraining(zoom=1.0, jitter=0.0)
    still.mean, still.std = module.mean, module.std
    white = torch.full((4, 3, 16, 16), 255, dtype=torch.uint8)
    torch.testing.assert_close(still.augment(white), torch.ones(4, 3, 16, 16))


def test_what_is_missing_is_said(tmp_path, tiny):
    with pytest.raises(PandaError, match="has no class folders"):
        LabelledFolder(root=str(tmp_path / "nowhere")).setup("fit")
    with (tiny / "val/val_annotations.txt").open("a") as file:
        file.write("val_n03_0.JPEG\tn03\t0\t0\t1\t1\n")
    with pytest.raises(PandaError, match="validation images of n03"):
        LabelledFolder(root=str(tiny)).setup("fit")
    (tiny / "val/val_annotations.txt").unlink()
    with pytest.raises(PandaError, match="no validation images"):
        LabelledFolder(root=str(tiny)).setup("fit")


def test_class_folders_of_validation_are_read_too(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    data = LabelledFolder(root=str(tmp_path), image_size=8, batch_size=2)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))["label"].tolist() == [0, 1]
