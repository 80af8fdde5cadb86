import shutil

import numpy as np
import pytest
from PIL import Image

from panda_lightning import ImageFolder, PandaError


def test_classes_are_folders_and_files_are_sorted(folder):
    (folder / "train/spot/notes.txt").write_text("not an image")
    (folder / "test/spot/deep").mkdir()
    (folder / "test/spot/106.png").rename(folder / "test/spot/deep/106.PNG")
    data = ImageFolder(root=str(folder), normal_class="spot")
    data.setup("fit")
    assert data.classes == ("spot", "stripe")
    assert [p.name for p in data.normal_images.sources] == [f"{n:03d}.png" for n in range(11)]
    assert len(data.test_images) == 13
    np.testing.assert_array_equal(data.test_images.targets, [0] * 7 + [1] * 6)


def test_a_single_training_class_is_the_normal_one(folder):
    data = ImageFolder(root=str(folder))
    data.setup("fit")
    assert data.problem["normal_class"] == "spot"
    assert data.normal_class is None  # other images may be put in its place


def test_testing_needs_no_training_images(folder):
    shutil.rmtree(folder / "train")
    data = ImageFolder(root=str(folder), normal_class="spot")
    data.setup("test")
    with pytest.raises(PandaError, match="no training images of the normal class spot in "):
        data.normal_dataloader()


def test_layouts_that_are_none_are_refused(tmp_path, folder):
    with pytest.raises(
        PandaError, match="there are no images in .*nowhere: expected .*train/<normal class>/.* end in .jpg"
    ):
        ImageFolder(root=str(tmp_path / "nowhere"), normal_class="spot").setup("fit")
    shutil.rmtree(folder / "train/spot")
    (folder / "train/other").mkdir()
    (folder / "train/other/a.png").write_bytes((folder / "test/spot/100.png").read_bytes())
    with pytest.raises(PandaError, match="no training images of the normal class spot"):
        ImageFolder(root=str(folder), normal_class="spot").setup("fit")


def test_masks_lie_in_ground_truth(folder):
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[:20] = 255
    for n in range(6):
        name = f"{n:03d}_mask.png" if n % 2 else f"{n:03d}.png"  # as in MVTec AD, or of the same name
        (folder / "ground_truth/stripe").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / "ground_truth/stripe" / name)
    data = ImageFolder(root=str(folder), normal_class="spot", image_size=20, crop="squash")
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["mask"].float().mean(dim=(1, 2)).tolist() == [0.0] * 7 + [0.5] * 6
    assert batch["mask"][-1, 0].all()
    (folder / "ground_truth/stripe/001_mask.png").unlink()
    data = ImageFolder(root=str(folder), normal_class="spot", image_size=20)
    with pytest.warns(UserWarning, match=r"1 of 6 anomalous images have no mask, so .*: test/stripe/001\.png"):
        data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["has_mask"].tolist() == [True] * 8 + [False] + [True] * 4
    assert batch["mask"].float().mean(dim=(1, 2)).tolist() == [0.0] * 7 + [0.5, 0, 0.5, 0.5, 0.5, 0.5]
