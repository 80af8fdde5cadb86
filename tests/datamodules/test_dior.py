import shutil

import numpy as np
import pytest
from PIL import Image

from panda_lightning import PandaError
from panda_lightning.datamodules.dior import DIOR
from tests.datamodules.official_medical_aerial import make_dior, voc

# Images are 80 x 60; crops of min_side=20 are worked out by hand.
TRAIN = {
    "00001": [
        ("ship", (10, 10, 30, 30)),  # 20 x 20: kept
        ("ship", (10, 10, 29, 40)),  # 19 x 30: too small for both, kept by any
        ("ship", (60, 20, 95, 50)),  # clamped to 20 x 30: kept
        ("ship", (61, 20, 95, 50)),  # clamped to 19 x 30: kept by any
        ("dam", (-5, -9, 15, 15)),  # clamped to 15 x 15: too small
        ("dam", (80, 10, 120, 50)),  # outside: empty
        ("submarine", (0, 0, 60, 60)),  # no such class
    ],
    "00002": [
        ("EXPRESSWAY_service area", (0, 0, 80, 60)),
        ("Expressway-Service-area", (1, 2, 31, 42)),
        ("Tennis Court", (5, 5, 45, 45)),
    ],
}
TEST = {
    "00003": [("ship", (0, 0, 25, 25)), ("expresswayservicearea", (0, 0, 20, 20)), ("dam", (0, 0, 50, 50))],
    "00004": [],
}
KEPT = {
    "train": {
        "Expressway-Service-area/00002_0.png": (80, 60),
        "Expressway-Service-area/00002_1.png": (30, 40),
        "ship/00001_0.png": (20, 20),
        "ship/00001_2.png": (20, 30),
        "tenniscourt/00002_2.png": (40, 40),
    },
    "test": {
        "Expressway-Service-area/00003_1.png": (20, 20),
        "dam/00003_2.png": (50, 50),
        "ship/00003_0.png": (25, 25),
    },
}


def module(root, **words):
    small = {"min_side": 20, "min_count": 2, "image_size": 16}
    return DIOR(**{"root": str(root), "normal_class": "ship", **small, **words})


def crops(cache, split):
    files = sorted((cache / split).rglob("*.png"))
    return {p.relative_to(cache / split).as_posix(): Image.open(p).size for p in files}


@pytest.mark.parametrize(
    ("below", "main", "doubled"),
    [
        (".", "Main", False),
        (".", "ImageSets/Main", True),
        (".", "Main/Main", True),
        ("DIOR", "ImageSets/Main", False),
        ("DIOR", "Main", True),
    ],
)
def test_layouts_and_the_rule_of_both_sides(tmp_path, below, main, doubled):
    make_dior(tmp_path / below, TRAIN, TEST, main, doubled)
    data = module(tmp_path)
    data.prepare_data()
    cache = tmp_path / "dior-crops-20-both"
    assert {split: crops(cache, split) for split in KEPT} == KEPT
    assert not list(tmp_path.glob(".dior-crops-*"))
    data.setup("fit")
    assert data.classes == ("Expressway-Service-area", "ship")  # dam and tenniscourt have less than two
    assert [p.name for p in data.normal_images.sources] == ["00001_0.png", "00001_2.png"]
    assert [p.name for p in data.test_images.sources] == ["00003_1.png", "00003_0.png"]
    np.testing.assert_array_equal(data.test_images.targets, [0, 1])
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["label"].tolist() == [1, 0]


def test_any_side_keeps_what_both_sides_drop(tmp_path):
    make_dior(tmp_path, TRAIN, TEST)
    data = module(tmp_path, side_rule="any")
    data.prepare_data()
    more = {"ship/00001_1.png": (19, 30), "ship/00001_3.png": (19, 30)}
    assert crops(tmp_path / "dior-crops-20-any", "train") == {**KEPT["train"], **more}
    assert not (tmp_path / "dior-crops-20-both").exists()


def test_a_crop_shows_what_is_in_the_box(tmp_path):
    make_dior(tmp_path, {"00001": [("ship", (60, 20, 95, 50))]}, {})
    module(tmp_path).prepare_data()
    image = np.asarray(Image.open(tmp_path / "JPEGImages-trainval/00001.jpg"))
    crop = np.asarray(Image.open(tmp_path / "dior-crops-20-both/train/ship/00001_0.png"))
    np.testing.assert_array_equal(crop, image[20:50, 60:80])


def test_the_table_counts_what_is_kept_and_dropped(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("panda_lightning.datamodules.dior.rank_zero_info", said.append)
    make_dior(tmp_path, TRAIN, TEST)
    module(tmp_path).prepare_data()
    lines = [line.split() for line in said[0].splitlines()]
    assert ["ship", "2", "1", "2", "0"] in lines  # train, test, too small, empty
    assert ["dam", "0", "1", "1", "1"] in lines
    assert "unknown class name: submarine 1" in said[0]


def test_min_count_and_arguments(tmp_path):
    make_dior(tmp_path, TRAIN, TEST)
    data = module(tmp_path, min_count=1)
    assert (data.hparams.min_count, data.hparams.side_rule, data.hparams.image_size) == (1, "both", 16)
    data.prepare_data()
    data.setup("fit")
    assert data.classes == ("Expressway-Service-area", "ship", "tenniscourt")
    with pytest.raises(PandaError, match="min_count=3 training crops; the largest has 2"):
        module(tmp_path, min_count=3).setup("fit")
    with pytest.raises(PandaError, match="normal_class=dam is not a class of DIOR .0-1: Expressway-Service-area, ship"):
        module(tmp_path, normal_class="dam").setup("fit")


def test_without_trainval_its_parts_train(tmp_path):
    make_dior(tmp_path, TRAIN, TEST)
    (tmp_path / "Main/trainval.txt").unlink()
    (tmp_path / "Main/train.txt").write_text("00002\n")
    with pytest.raises(PandaError, match="DIOR has no .*Main/val.txt"):
        module(tmp_path).prepare_data()
    (tmp_path / "Main/val.txt").write_text("00001\n")
    module(tmp_path).prepare_data()
    assert crops(tmp_path / "dior-crops-20-both", "train") == KEPT["train"]


def test_crops_do_without_the_images(tmp_path):
    make_dior(tmp_path, TRAIN, TEST)
    module(tmp_path).prepare_data()
    for name in ("JPEGImages-trainval", "JPEGImages-test", "Annotations", "Main"):
        shutil.rmtree(tmp_path / name)
    data = module(tmp_path)
    data.prepare_data()
    data.setup("fit")
    assert len(data.normal_images) == 2
    with pytest.raises(PandaError, match="DIOR has no"):  # other crops need them
        module(tmp_path, min_side=21).prepare_data()


def test_a_run_that_is_stopped_leaves_no_crops(tmp_path, monkeypatch):
    make_dior(tmp_path, TRAIN, TEST)
    with monkeypatch.context() as patch:
        patch.setattr("panda_lightning.datamodules.dior.json.dumps", _stop)
        with pytest.raises(KeyboardInterrupt):
            module(tmp_path).prepare_data()
    assert not list(tmp_path.glob("*dior-crops*"))
    module(tmp_path).prepare_data()
    assert crops(tmp_path / "dior-crops-20-both", "train") == KEPT["train"]


def _stop(*_, **__):
    raise KeyboardInterrupt


def test_crops_of_a_quicker_process_are_kept(tmp_path, monkeypatch):
    make_dior(tmp_path, TRAIN, TEST)
    theirs = tmp_path / "dior-crops-20-both/theirs"

    def meanwhile(*_, **__):
        theirs.mkdir(parents=True)
        return "{}"

    with monkeypatch.context() as patch:
        patch.setattr("panda_lightning.datamodules.dior.json.dumps", meanwhile)
        module(tmp_path).prepare_data()
    assert [p.name for p in tmp_path.glob("*dior-crops*/*")] == ["theirs"]


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    objects = [("ship", (0, 0, 40, 40))]
    make_dior(tmp_path, {f"0000{n}": objects for n in range(1, 8)}, {"00009": objects})
    boxes = tmp_path / "Annotations/Horizontal Bounding Boxes"
    (tmp_path / "JPEGImages-trainval/00001.jpg").unlink()
    (tmp_path / "JPEGImages-trainval/00002.jpg").write_bytes(b"no image")
    (boxes / "00003.xml").write_text("<annotation><object>")
    (boxes / "00004.xml").write_text(voc(objects).replace("<xmax>40</xmax>", ""))
    (boxes / "00005.xml").unlink()
    data = module(tmp_path)
    data.prepare_data()
    images = data.read("train")
    assert [p.name for p in images.sources] == ["00006_0.png", "00007_0.png"]
    (problem,) = images.problems
    assert problem.startswith("5 of 7 train images gave no crops: ")
    for part in ("1.jpg is missing", "2.jpg cannot be read", "3.xml cannot", "4.xml cannot", "5.xml is missing"):
        assert f"0000{part}" in problem
    assert "remove " + str(tmp_path / "dior-crops-20-both") in problem
    assert data.read("test").problems == ()


def test_what_is_missing_is_said_with_the_steps(tmp_path):
    for step in (lambda data: data.prepare_data(), lambda data: data.setup("fit")):
        with pytest.raises(PandaError, match=r"gcheng-nwpu.*JPEGImages-trainval/.*Main/ are in .*; or set --data.root"):
            step(module(tmp_path))
    make_dior(tmp_path, TRAIN, TEST)
    with pytest.raises(PandaError, match=r"dior-crops-20-both is missing: call prepare_data"):
        module(tmp_path).setup("fit")
    with pytest.raises(PandaError, match=r"no box of the 2 images .*min_side=200 px: lower it"):
        module(tmp_path, min_side=200).prepare_data()
    assert not list(tmp_path.glob("*dior-crops*"))
    shutil.rmtree(tmp_path / "JPEGImages-test")
    with pytest.raises(PandaError, match="DIOR has no .*/JPEGImages-test, "):
        module(tmp_path).prepare_data()
