import subprocess

import pytest

from panda_lightning import PandaError
from panda_lightning.datamodules import CatsVsDogs
from tests.conftest import picture
from tests.datamodules.official import make_cats_vs_dogs


@pytest.mark.parametrize("form", ["microsoft", "kaggle"])
def test_both_forms_give_the_same_split(tmp_path, form):
    make_cats_vs_dogs(tmp_path, form)
    data = CatsVsDogs(root=str(tmp_path), normal_class="cat")
    data.prepare_data()
    data.setup("fit")
    numbers = [int(p.stem.split(".")[-1]) for p in data.normal_images.sources]
    assert numbers == list(range(6))
    numbers = [int(p.stem.split(".")[-1]) for p in data.test_images.sources]
    assert numbers == [*range(10000, 10004)] * 2
    assert data.test_images.targets.tolist() == [0] * 4 + [1] * 4


def test_broken_stray_and_doubled_things_are_passed_over(tmp_path):
    make_cats_vs_dogs(tmp_path)
    (tmp_path / "PetImages/Cat/666.jpg").write_bytes(b"")
    (tmp_path / "PetImages/Dog/11702.jpg").write_bytes(b"")
    (tmp_path / "PetImages/Dog/Thumbs.db").write_bytes(b"stray")
    picture("spot", 1).save(tmp_path / "PetImages/Cat/copy of 3.jpg")
    expected = [CatsVsDogs(root=str(tmp_path)).read(split).sources for split in ("train", "test")]
    assert [len(s) for s in expected] == [12, 8]
    (tmp_path / "deep").mkdir()
    (tmp_path / "PetImages").rename(tmp_path / "deep/PetImages")
    (tmp_path / "deep").rename(tmp_path / "PetImages")
    assert len(CatsVsDogs(root=str(tmp_path)).read("train")) == 12


def test_a_missing_class_is_a_problem_that_is_said(tmp_path):
    make_cats_vs_dogs(tmp_path)
    (tmp_path / "PetImages/Dog").rename(tmp_path / "PetImages/Hund")
    data = CatsVsDogs(root=str(tmp_path), normal_class="cat")
    assert data.read("test").problems == ("there are no test images of class dog",)
    with pytest.warns(UserWarning, match="there are no test images of class dog"):
        data.setup("fit")
    data = CatsVsDogs(root=str(tmp_path), normal_class="dog")
    with pytest.raises(PandaError, match="all anomalous with normal class dog"):
        data.setup("fit")


def test_nothing_there_is_said_with_both_layouts(tmp_path):
    with pytest.raises(PandaError, match=r"PetImages/Cat/<n>.jpg \(Microsoft\) or .*train/cat.<n>.jpg \(Kaggle\)"):
        CatsVsDogs(root=str(tmp_path)).read("train")


@pytest.mark.slow
def test_real_images(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "cats_vs_dogs"], check=True)
    data = CatsVsDogs(root=str(tmp_path / "cats_vs_dogs"), normal_class="cat", image_size=32, memory_gb=1)
    data.prepare_data()
    data.setup("fit")
    assert (len(data.normal_images), len(data.test_images)) == (1999, 1000)
    assert len(data.val_dataloader().dataset) == 1000  # all can be read
