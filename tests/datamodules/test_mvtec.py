import shutil
import subprocess

import numpy as np
import pytest
import torch

from panda_lightning import PandaError
from panda_lightning.datamodules import MVTecAD, mvtec
from tests.datamodules.official import make_mvtec


@pytest.mark.parametrize("place", ["", "mvtec", "mvtec_anomaly_detection", "bottle"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_layouts_and_single_channel_categories(tmp_path, place, mode):
    make_mvtec(tmp_path / place, mode=mode)
    data = MVTecAD(root=str(tmp_path), image_size=20, crop="squash")
    data.prepare_data()
    data.setup("fit")
    assert data.classes == ("good", "broken")
    assert len(data.normal_images) == 6
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (8, 3, 20, 20)
    assert batch["label"].tolist() == [1] * 4 + [0] * 4  # broken sorts before good
    assert batch["mask"].dtype == torch.bool
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[:10] = True
    for i in range(8):
        assert torch.equal(batch["mask"][i], expected if i < 4 else torch.zeros_like(expected))
    assert "mask" not in next(iter(data.train_dataloader()))


def test_masks_follow_the_centre_crop(tmp_path):
    make_mvtec(tmp_path)
    data = MVTecAD(root=str(tmp_path), image_size=20, resize=40)  # the middle 20 rows of 40: mask covers 10 of them
    data.setup("test")
    assert next(iter(data.test_dataloader()))["mask"].float().mean((1, 2)).tolist() == [0.5] * 4 + [0.0] * 4


def test_a_missing_mask_costs_one_mask_and_is_said(tmp_path):
    make_mvtec(tmp_path)
    (tmp_path / "bottle/ground_truth/broken/002_mask.png").unlink()
    data = MVTecAD(root=str(tmp_path), image_size=20)
    with pytest.warns(UserWarning, match=r"1 of 4 anomalous images have no mask, so .*: bottle/test/broken/002.png"):
        data.setup("test")
    assert next(iter(data.test_dataloader()))["has_mask"].tolist() == [True, True, False, True] + [True] * 4
    shutil.rmtree(tmp_path / "bottle/ground_truth")
    with pytest.warns(UserWarning, match=r"4 of 4 anomalous images have no mask"):
        data.setup("test")
    assert "mask" not in next(iter(data.test_dataloader()))


def test_the_licence_comes_before_the_download(tmp_path, monkeypatch):
    with pytest.raises(PandaError, match="CC BY-NC-SA 4.0.*--data.accept_license true"):
        MVTecAD(root=str(tmp_path)).prepare_data()
    with pytest.raises(PandaError, match="category=botle is neither a folder .* bottle, cable"):
        MVTecAD(root=str(tmp_path), category="botle").prepare_data()
    calls = []
    monkeypatch.setattr(mvtec, "fetch", lambda *a: calls.append(a) or tmp_path)
    monkeypatch.setattr(mvtec, "unpack", lambda *a: calls.append(a))
    MVTecAD(root=str(tmp_path), accept_license=True).prepare_data()
    assert calls[0][2] == "sha256:cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
    assert calls[1] == (tmp_path, tmp_path / "mvtec")


def test_an_empty_split_is_named(tmp_path):
    make_mvtec(tmp_path)
    (tmp_path / "bottle/train/good").rename(tmp_path / "bottle/train-elsewhere")
    with pytest.raises(PandaError, match="no images in .*train: expected"):
        MVTecAD(root=str(tmp_path)).read("train")


@pytest.mark.slow
def test_real_images(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "mvtec"], check=True)
    leather = MVTecAD(root=str(tmp_path), category="leather", image_size=64, crop="squash")
    leather.setup("fit")
    assert (len(leather.normal_images), len(leather.test_images)) == (4, 15)
    batch = next(iter(leather.test_dataloader()))
    defect = batch["label"].bool()
    assert batch["mask"][defect].any(2).any(1).all()
    assert not batch["mask"][~defect].any()
    bottle = MVTecAD(root=str(tmp_path), category="bottle", image_size=64)
    with pytest.warns(UserWarning, match="have no mask"):
        bottle.setup("fit")
    assert np.unique(bottle.test_images.targets).size == len(bottle.classes) == 4
