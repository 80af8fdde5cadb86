import logging
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from panda_lightning import DN2, ImageFolder, PandaError
from tests.conftest import fast, picture


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


def test_a_run_reads_every_class_folder_once(folder, monkeypatch):
    seen, scandir = Counter(), os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: (seen.update([str(place)]), scandir(place))[1])
    data = ImageFolder(root=str(folder), image_size=16, calibration_fraction=0.3)
    for runs in (1, 2):
        data.setup("fit")
        data.origin(training=True)
        list(data.normal_dataloader())
        for name in ("train/spot", "test/spot", "test/stripe"):
            assert seen[str(folder / name)] == runs


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


def normal_class(root, wanted):
    data = ImageFolder(root=str(root), normal_class=wanted)
    _ = data.test_images
    return data.problem["normal_class"]


def test_what_a_system_or_a_person_leaves_behind_is_no_class(folder):
    for junk in ("test/.ipynb_checkpoints", "test/__MACOSX", "train/.spot", "test/empty", "test/only_notes"):
        (folder / junk).mkdir()
        if "empty" not in junk:
            picture("cloud", 1).save(folder / junk / ("._a.png" if "notes" in junk else "a.png"))
    (folder / "test/spot/._100.png").write_bytes(b"\x00\x05\x16\x07")
    data = ImageFolder(root=str(folder))
    data.setup("fit")
    assert data.classes == ("spot", "stripe")
    assert len(data.test_images) == 13


def test_linked_folders_are_read(tmp_path, folder):
    (folder / "train/spot/more").symlink_to(folder / "test/spot")
    data = ImageFolder(root=str(folder), normal_class="spot")
    data.setup("fit")
    assert len(data.normal_images) == 18


def test_images_beside_class_folders_are_counted(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    picture("spot", 1).save(folder / "test/loose.png")
    ImageFolder(str(folder), normal_class="spot").setup("test")
    assert re.search(r"1 images directly in .*test are ignored, because they are in no class", caplog.text)
    (tmp_path / "flat").mkdir()
    picture("spot", 1).save(tmp_path / "flat/a.png")
    with pytest.raises(PandaError, match=r"1 images are directly in .*flat: put the normal ones in .*flat/train/good"):
        ImageFolder(str(tmp_path / "flat"), normal_class="spot").setup("test")


def test_folders_may_begin_with_a_capital(folder):
    (folder / "train").rename(folder / "Train")
    (folder / "test").rename(folder / "TEST")
    (folder / "Ground_Truth/stripe").mkdir(parents=True)
    Image.new("L", (40, 40), 1).save(folder / "Ground_Truth/stripe/000.png")
    data = ImageFolder(str(folder))
    data.setup("fit")
    assert (len(data.normal_images), len(data.test_images)) == (11, 13)
    assert data.test_images.masks[7] == folder / "Ground_Truth/stripe/000.png"


def test_the_home_folder(folder, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder.parent))
    assert len(ImageFolder(root=f"~/{folder.name}", normal_class="spot").normal_images) == 11


# ---- a folder of classes alone -----------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """good 20, bad 6, with masks."""
    for kind, name, count in (("spot", "good", 20), ("stripe", "bad", 6)):
        (tmp_path / "bare" / name).mkdir(parents=True)
        for number in range(count):
            picture(kind, number).save(tmp_path / "bare" / name / f"{number:03d}.png")
    (tmp_path / "bare/ground_truth/bad").mkdir(parents=True)
    for number in range(6):
        Image.new("L", (40, 40), 1).save(tmp_path / f"bare/ground_truth/bad/{number:03d}.png")
    return tmp_path / "bare"


def test_a_folder_without_train_and_test_is_offered_a_split(bare):
    with pytest.raises(
        PandaError, match="contains bad, good, but neither train nor test: set data.split=0.8 to train on"
    ):
        ImageFolder(root=str(bare), normal_class="good").setup("fit")
    with pytest.raises(PandaError, match="normal_class=None is not a class"):
        ImageFolder(root=str(bare), split=0.8).setup("fit")


def test_a_split_depends_on_names_alone(bare, tmp_path):
    def of(root, **options):
        data = ImageFolder(**{"root": str(root), "normal_class": "good", "split": 0.8, "image_size": 32, **options})
        data.setup("fit")
        return data

    data = of(bare)
    assert (len(data.normal_images), len(data.test_images)) == (16, 10)
    assert not set(data.normal_images.sources) & set(data.test_images.sources)
    assert data.is_anomalous(data.test_images.targets).sum() == 6
    assert [mask is not None for mask in data.test_images.masks] == data.is_anomalous(data.test_images.targets).tolist()
    shutil.copytree(bare, tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere").manifest() == data.manifest()
    assert of(bare, seed=1).manifest() != data.manifest()
    before = set(data.names(data.normal_images))
    picture("spot", 99).save(bare / "good/999.png")
    assert len(set(of(bare).names(of(bare).normal_images)) - before) <= 2  # one more, and what it displaces
    (bare / "train").mkdir()
    with pytest.raises(PandaError, match=r"already has a folder train, so data\.split=0\.8 does not apply"):
        of(bare)


def test_a_run_writes_the_split(bare, tmp_path):
    data = ImageFolder(root=str(bare), normal_class="good", split=0.5, image_size=32)
    pl.Trainer(default_root_dir=tmp_path, logger=CSVLogger(tmp_path, "t"), enable_progress_bar=False).test(
        DN2("panda_tiny"), data, verbose=False
    )
    assert (tmp_path / "t/version_0/manifest.csv").read_text().count(",train,0\n") == 10


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_reach_every_output(folder, run):
    try:
        os.rename(folder / "test/stripe/003.png", os.fsencode(folder) + b"/test/stripe/caf\xe9.png")
        os.rename(folder / "train/spot/003.png", os.fsencode(folder) + b"/train/spot/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    run("test", *fast(folder, model="SPADE"), "--data.image_size=64", "--model.levels=[1]")
    run("predict", *fast(folder, model="SPADE"), "--data.image_size=64", "--model.levels=[1]", "--ckpt_path=last")
    written = Path("runs/t/version_1/predictions.csv").read_text(encoding="utf-8")
    assert r"test/stripe/caf\xe9.png" in written
    assert Path(r"runs/t/version_1/maps/test/stripe/caf\xe9.png.npy").is_file()
    data = ImageFolder(root=str(folder), normal_class="spot", image_size=32)
    assert r"train/spot/caf\xe9.png,train,0" in data.manifest()


def test_maps_of_one_stem_lie_side_by_side(folder, run):
    for ending in ("jpg", "bmp"):
        Image.open(folder / "test/stripe/000.png").save(folder / f"test/stripe/000.{ending}")
    run("predict", *fast(folder, model="PatchCore"), "--data.image_size=64", "--model.levels=[1]")
    maps = sorted(path.name for path in Path("runs/t/version_0/maps/test/stripe").glob("000*"))
    assert maps == [f"000.{ending}.{kind}" for ending in ("bmp", "jpg", "png") for kind in ("npy", "png")]


# ---- intensity ---------------------------------------------------------------------------------------------------


def test_the_rule_for_intensity_travels_in_the_checkpoint(folder, run):
    def deepen(path):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 16).save(path)

    shallow = run("test", *fast(folder, model="DN2"))
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    grey = auroc_of(run("test", *fast(folder, model="DN2")))
    for path in folder.rglob("*.png"):
        deepen(path)
    with pytest.warns(UserWarning, match=r"nearly black: their values lie between .*, so set data\.intensity=bits:12"):
        run("test", *fast(folder, model="DN2"))
    assert auroc_of(run("test", *fast(folder, model="DN2"), "--data.intensity=bits:12")) == grey
    assert auroc_of(shallow) > 0  # colours
    last = "runs/t/version_3/checkpoints/last.ckpt"
    assert auroc_of(run("test", *fast(folder, model="DN2"), f"--ckpt_path={last}")) == grey
    with pytest.raises(SystemExit, match="intensity"):
        run("test", *fast(folder, model="DN2"), f"--ckpt_path={last}", "--data.intensity=bits:16")


def test_the_rule_may_be_changed_between_runs(folder, tmp_path):
    for path in folder.rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 16).save(path)

    def data(rule):
        return ImageFolder(str(folder), normal_class="spot", image_size=32, intensity=rule)

    def scores(detector, module):
        trainer = pl.Trainer(logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.test(detector, module, verbose=False)
        return detector.scores.score

    detector, module = DN2("panda_tiny"), data("bits:12")
    for rule in ("bits:12", "window:0,999", "bits:12", "bits:16"):
        module.intensity = rule
        assert scores(detector, module).equal(scores(DN2("panda_tiny"), data(rule)))


def auroc_of(output: str) -> float:
    return float(re.search(r"AUROC ([\d.]+) of", output)[1])
