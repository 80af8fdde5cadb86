"""``panda check-data`` as a user calls it, in this process."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panda_lightning import ImageFolder, PandaError
from panda_lightning.pictures.images import Images
from panda_lightning.tools import check_data, main
from tests.conftest import make_folder, picture
from tests.datamodules.official import make_cifar10, make_mvtec, write_cifar10
from tests.datamodules.official_medical_aerial import make_labeled, make_segmented
from tests.pictures.files import dicom, with_orientation

ROOT = Path(__file__).parents[2]


class MaskedFolder(ImageFolder):
    """A mask for the first anomalous test image, and a problem."""

    own_split = True

    def read(self, split):
        images = super().read(split)
        if split == "train":
            return images
        masks = [None] * len(images)
        masks[-1] = self.root / "mask.png"
        return Images(images.sources, images.targets, masks, ("two masks have no image",))


@pytest.fixture
def panda(workdir, capsys):
    def call(*words):
        status = main(["check-data", *map(str, words)])
        text = capsys.readouterr()
        assert "Traceback" not in text.out + text.err
        return status, text.out

    return call


@pytest.fixture
def words(folder):
    return [f"--config={ROOT}/conf/folder.yaml", f"--data.root={folder}", "--data.image_size=32"]


def row(out: str, heading: str) -> list[str]:
    """The cells of a table's row."""
    line = next(line for line in out.splitlines() if re.match(rf" *{re.escape(heading)}  ", line))
    return re.split(r"  +", line.strip())[1:]


def defects(out: str) -> list[str]:
    head, _, rest = out.partition(" defects:\n") if " defects:\n" in out else out.partition(" defect:\n")
    lines = [line for line in rest.splitlines() if line.startswith("- ")]
    assert int(head.splitlines()[-1]) == len(lines)
    return lines


def ink(path: Path) -> float:
    with Image.open(path) as image:
        return float((np.asarray(image.convert("L")) < 128).mean())


def test_a_clean_folder(panda, words, folder):
    (folder / "train/stripe").mkdir()
    picture("stripe", 50, 64).save(folder / "train/stripe/x.png")
    picture("spot", 51).convert("L").save(folder / "train/spot/grey.png")
    shutil.copy(folder / "train/spot/000.png", folder / "train/spot/again.png")  # a note, no defect
    status, out = panda(*words, "--data.normal_class=spot", "--data.train_limit=10")
    assert status == 0
    assert "No defects." in out
    assert "ImageFolder, class spot with protocol one_vs_rest" in out
    assert row(out, "spot") == ["normal", "13", "used", "7", "53.8%"]
    assert row(out, "stripe") == ["anomalous", "1", "not used", "6", "46.2%"]
    assert row(out, "total") == ["14", "13"]
    assert row(out, "normal") == ["13 (92.9%)", "7 (53.8%)"]
    assert row(out, "anomalous") == ["1 (7.1%)", "6 (46.2%)"]
    assert row(out, "used by the protocol") == ["10", "13"]
    assert row(out, "width x height") == ["40 x 40 to 64 x 64", "40 x 40"]
    assert row(out, "modes") == ["RGB 13, L 1", "RGB 13"]
    assert row(out, "unreadable") == ["0", "0"]
    assert row(out, "copies within the split") == ["1", "0"]
    assert row(out, "decoded at 32 px, limit 4 GiB") == ["30.0 KiB in memory", "39.0 KiB in memory"]
    assert re.search("Manifest: check-data-imagefolder.manifest.csv, 23 images, .*\n  sha256 [0-9a-f]{64}\n", out)
    assert "Contact sheet: check-data-imagefolder.png" in out
    assert ink(Path("check-data-imagefolder.png")) > 0.05


def test_what_does_not_fit_into_memory_is_said(panda, words):
    _, out = panda(*words, "--data.memory_gb=0")
    assert row(out, "decoded at 32 px, limit 0 GiB") == ["33.0 KiB from disk", "39.0 KiB from disk"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("short.png", "truncated|incomplete|broken"),
        ("short.jpg", "truncated"),
        ("empty.png", "empty file"),
        ("text.png", "not an image"),
    ],
)
@pytest.mark.parametrize("place", ["train/spot", "test/stripe"])
def test_unreadable_files_are_named(panda, words, folder, place, name, reason):
    path = folder / place / name
    picture("spot", 60).save(path)
    if name.startswith("short"):
        truncate(path)
    else:
        path.write_text("" if name.startswith("empty") else "no image at all")
    status, out = panda(*words)
    assert status == 1
    (said,) = defects(out)
    assert re.search(rf"- {place}/{name} cannot be read: .*({reason})", said, re.IGNORECASE), said
    assert row(out, "unreadable") == (["1", "0"] if place.startswith("train") else ["0", "1"])
    assert Path("check-data-imagefolder.png").is_file()


def test_many_unreadable_files_are_counted(panda, words, folder):
    for n in range(60):
        (folder / f"test/stripe/empty{n}.png").touch()
    _, out = panda(*words)
    assert "60 defects:" in out
    assert "- and 10 more unreadable files" in out


def test_a_file_in_train_and_test_is_named_with_its_twin(panda, words, folder):
    shutil.copy(folder / "train/spot/003.png", folder / "test/spot/other name [1].png")
    status, out = panda(*words)
    assert status == 1
    assert defects(out) == ["- test image test/spot/other name [1].png is a copy of training image train/spot/003.png."]


def test_a_renamed_class_is_named_and_the_rest_still_counted(panda, words, folder):
    (folder / "train/spot").rename(folder / "train/good")
    (folder / "test/spot").rename(folder / "test/good")
    (folder / "test/good/empty.png").touch()
    status, out = panda(*words, "--data.normal_class=spot")
    assert status == 1
    refusal, unreadable = defects(out)
    assert "normal_class=spot is not a class of ImageFolder (0-1: good, stripe)" in refusal
    assert "test/good/empty.png" in unreadable
    assert row(out, "good") == ["?", "11", "8", "57.1%"]


@pytest.mark.parametrize(("gone", "kind"), [("stripe", "normal"), ("spot", "anomalous")])
def test_a_test_split_of_one_kind(panda, words, folder, gone, kind):
    shutil.rmtree(folder / "test" / gone)
    status, out = panda(*words)
    assert status == (kind == "anomalous")
    assert ("are all anomalous with normal class spot" in out) == (kind == "anomalous")
    assert ("there are no anomalous images, so there is no AUROC" in out) == (kind == "normal")


def test_a_folder_without_images_is_no_class(panda, words, folder):
    (folder / "test/scratch").mkdir()
    (folder / "test/scratch/a.heic").touch()
    status, out = panda(*words)
    assert status == 0
    assert "1 files are ignored: .heic 1" in out
    assert "scratch" not in out


def test_leave_one_out_needs_every_normal_class(panda, words, folder):
    (folder / "test/ring").mkdir()
    picture("spot", 70).save(folder / "test/ring/a.png")
    status, out = panda(*words, "--data.normal_class=stripe", "--data.protocol=leave_one_out")
    assert status == 1
    assert defects(out) == ["- class ring has no train images."]


def test_no_training_images_of_the_normal_class(panda, words):
    status, out = panda(*words, "--data.normal_class=stripe")
    assert status == 1
    (said,) = defects(out)
    assert "no training images of the normal class stripe" in said
    assert row(out, "used by the protocol") == ["none", "13"]


def test_where_training_images_lack_the_test_images_are_reported(panda, words, folder):
    shutil.rmtree(folder / "train")
    (folder / "test/spot/empty.png").touch()
    status, out = panda(*words, "--data.normal_class=spot")
    assert status == 1
    assert [("no training images" in d, "empty.png" in d) for d in defects(out)] == [(True, False), (False, True)]
    assert row(out, "total") == ["0", "14"]
    assert Path("check-data-imagefolder.png").is_file()


def test_no_data_at_all(panda, words):
    status, out = panda(*words, "--data.root=/nonexistent", "--data.normal_class=spot")
    assert status == 1
    assert all("/nonexistent" in d for d in defects(out))


def test_a_refused_download_is_a_defect(panda, workdir, monkeypatch):
    def refuse(self):
        raise PandaError("the archive is not the official one.")

    monkeypatch.setattr("panda_lightning.CIFAR10.prepare_data", refuse)
    status, out = panda("--data=CIFAR10", "--data.root=nowhere", "--data.normal_class=0")
    assert status == 1
    assert defects(out) == ["- the archive is not the official one."]


def test_masks_and_problems(panda, folder, words, monkeypatch):
    data = MaskedFolder(root=str(folder), image_size=32)
    mask = Image.new("L", (40, 40))
    mask.paste(1, (0, 0, 9, 9))
    mask.save(folder / "mask.png")
    lack = "test: 5 of 6 anomalous images have no mask, so their pixels do not count: "
    found = check_data.check(data, Path("one.png"))
    assert found[0] == "test: two masks have no image"
    assert found[1].startswith(lack)
    assert len(found) == 2
    (folder / "mask.png").write_text("")
    found = check_data.check(MaskedFolder(root=str(folder), image_size=32), Path("deep/one.png"))
    assert found[2] == "test/stripe/005.png cannot be read: its mask mask.png: empty file."
    assert Path("deep/one.png").is_file()


def test_masks_are_counted(folder, workdir, capsys):
    Image.new("L", (40, 40)).save(folder / "mask.png")
    check_data.check(MaskedFolder(root=str(folder), image_size=32), Path("one.png"))
    out = capsys.readouterr().out
    assert row(out, "masks") == ["none", "1 of 6 anomalous"]
    assert "follows our own rule" in out


def test_arrays(panda, workdir):
    make_cifar10(workdir / "official")
    call = [f"--config={ROOT}/conf/cifar10.yaml", "--data.root=official", "--data.image_size=32", "-o", "sheet.png"]
    status, out = panda(*call)
    assert status == 0
    assert row(out, "airplane") == ["normal", "5", "used", "2", "10.0%"]
    assert row(out, "width x height") == ["32 x 32", "32 x 32"]
    assert row(out, "on disk") == ["150.0 KiB as an array", "60.0 KiB as an array"]
    assert ink(Path("sheet.png")) > 0.05

    rng = np.random.default_rng(5)
    images = rng.integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    write_cifar10(workdir / "official", np.concatenate([images, images[:1]]), np.arange(21) % 10, "train")
    write_cifar10(workdir / "official", np.concatenate([images[5:6], 255 - images]), np.arange(21) % 10, "test")
    status, out = panda(*call)
    assert status == 1
    assert defects(out) == ["- test image row 0 is a copy of training image row 5."]
    assert row(out, "copies within the split") == ["1", "0"]


def test_the_shipped_digits_have_no_defects(panda):
    status, out = panda(f"--config={ROOT}/conf/digits.yaml", f"--config={ROOT}/conf/variants/dn2.yaml")
    assert status == 0
    assert row(out, "total") == ["899", "898"]


def test_a_config_is_laid_over_another(panda, workdir):
    (workdir / "over.yaml").write_text("data: {init_args: {normal_class: 7}}\n")
    _, out = panda(f"--config={ROOT}/conf/digits.yaml", "-c", "over.yaml")
    assert row(out, "7")[0] == "normal"
    assert "decoded at 64 px" in out  # of the first file


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--data.image_sise=3"], "image_sise"),
        (["--config=typo.yaml"], "modle"),
        (["--data.crop=centre"], r"expected one of \['center', 'squash', 'none'\]"),
        (["--data.resize=3"], "resize=3 is smaller than image_size=64"),
        (["--data=Digitz"], "Digitz. Available are the detectors"),
    ],
)
def test_mistakes_end_in_a_sentence(panda, capsys, workdir, more, sentence):
    (workdir / "typo.yaml").write_text("modle: {class_path: PANDA}\n")
    with pytest.raises(SystemExit) as stop:
        panda(f"--config={ROOT}/conf/digits.yaml", *more)
    assert stop.value.code not in (0, None)
    text = capsys.readouterr()
    said = stop.value.code if isinstance(stop.value.code, str) else text.err
    assert re.search(sentence, said), said
    assert "Traceback" not in text.err
    assert "usage:" not in text.err
    assert said.count("\n") <= 1


def test_the_module_runs_and_gives_the_exit_status(workdir):
    make_folder(workdir / "images", train=3, normal=2, anomalous=1)
    (workdir / "images/test/spot/empty.png").touch()
    words = [sys.executable, "-m", "panda_lightning.tools", "check-data", "--data=ImageFolder", "--data.root=images"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("1 defect:\n- test/spot/empty.png cannot be read: empty file.\n")
    assert not done.stderr


def test_damage_to_the_real_data_sets_layouts_is_named(panda, workdir):
    """A mask that is missing, a CSV row without a file, an archive that climbs out."""
    make_mvtec(workdir / "mvtec")
    (workdir / "mvtec/bottle/ground_truth/broken/001_mask.png").unlink()
    status, out = panda(f"--config={ROOT}/conf/mvtec.yaml", f"--data.root={workdir}")
    assert status == 1
    assert "1 of 4 anomalous images have no mask, so their pixels do not count: mvtec/bottle/test/broken/001.png" in out

    make_labeled(workdir / "kvasir", {"cecum": 9})
    make_segmented(workdir / "kvasir")
    (workdir / "kvasir/2_fold_split.csv").write_text("file-name;class-name;split-index\nlost.jpg;cecum;0\n")
    status, out = panda(
        f"--config={ROOT}/conf/hyper_kvasir.yaml", f"--data.root={workdir}/kvasir", "--data.test_normals=3"
    )
    assert status == 1
    assert "lost" in out

    (workdir / "cats").mkdir()
    with zipfile.ZipFile(workdir / "cats/kagglecatsanddogs_5340.zip", "w") as bundle:
        bundle.writestr("PetImages/../../outside.jpg", "x")
    status, out = panda(f"--config={ROOT}/conf/cats_vs_dogs.yaml", f"--data.root={workdir}/cats")
    assert status == 1
    assert "PetImages/../../outside.jpg would be written outside its folder" in out
    assert not list(workdir.rglob("outside.jpg"))


# ---- damaged copies ----------------------------------------------------------------------------------------------


def every(folder: Path, change) -> None:
    """Write each picture anew: what ``change`` makes of its grey values."""
    for path in folder.rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path).convert("L")))).save(path.with_suffix(".tif"))
        path.unlink()


def with_masks(folder: Path, draw) -> None:
    """Masks of all anomalous images: what ``draw`` makes of a number."""
    (folder / "ground_truth/stripe").mkdir(parents=True)
    for number in range(6):
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[8:16, 8:16] = 1
        Image.fromarray(draw(mask, number)).save(folder / f"ground_truth/stripe/{number:03d}.png")


def turn(folder: Path) -> None:
    for path in sorted(folder.rglob("00[12].png")):
        with_orientation(path, np.asarray(Image.open(path)), 6)


def widen(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        Image.open(path).resize((120, 40)).save(path)


def link(folder: Path) -> None:
    (folder / "train/spot/up").symlink_to(folder / "train/spot")
    (folder / "train/spot/dead.png").symlink_to(folder / "gone.png")


def strew(folder: Path) -> None:
    for junk in ("test/.ipynb_checkpoints/a.png", "test/__MACOSX/a.png", "test/spot/._a.png", "test/empty/notes.txt"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_text("x")


def strip(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    for kind in ("spot", "stripe"):
        (folder / "test" / kind).rename(folder / kind)
    shutil.rmtree(folder / "test")


DAMAGES = {
    "12 bits": (lambda f: every(f, lambda a: a.astype(np.uint16) * 16), "so set data.intensity=bits:12", 1),
    "int32": (lambda f: every(f, lambda a: a.astype(np.int32)), "have no range of their own: set intensity to bits", 1),
    "float": (lambda f: every(f, lambda a: a.astype(np.float32)), "lie outside 0 to 1: set intensity to window", 1),
    "turned": (turn, "of 13 images are rotated as their EXIF orientation says (", 0),
    "no mask pixels": (lambda f: with_masks(f, lambda m, n: m * (n > 1)), "2 of 6 masks show no anomalous pixel", 1),
    "inverted": (lambda f: with_masks(f, lambda m, n: 1 - m), "if they are inverted, set data.mask_values", 1),
    "large": (lambda f: with_masks(f, lambda m, n: m if n else m + 1), "1 of 6 masks cover more than half", 0),
    "other sides": (lambda f: with_masks(f, lambda m, n: m[:20]), "do not have the size of their images and are", 1),
    "a lost mask": (
        lambda f: (with_masks(f, lambda m, n: m), (f / "ground_truth/stripe/003.png").unlink()),
        "1 of 6 anomalous images have no mask, so their pixels do not count: test/stripe/003.png",
        1,
    ),
    "wide": (widen, "the centre crop leaves out 71% of the images' longer side", 0),
    "cut away": (
        lambda f: (widen(f), with_masks(f, lambda m, n: np.pad(m, ((0, 0), (0, 80))))),
        "6 of 6 masks lose all anomalous pixels in the crop, or at 32 px",
        1,
    ),
    "links": (link, "2 files are ignored", 0),
    "strewn": (strew, "1 files are ignored: .txt 1", 0),
    "other endings": (lambda f: (f / "test/spot/a.heic").touch(), "1 files are ignored: .heic 1", 0),
    "bare": (strip, "contains spot, stripe, but neither train nor test: set data.split=0.8", 1),
    "too large": (
        lambda f: Image.new("1", (20000, 20000)).save(f / "test/spot/huge.png"),
        "huge.png cannot be read: Image size (400000000 pixels) exceeds limit of",
        1,
    ),
    "narrow": (lambda f: Image.new("L", (1, 900), 99).save(f / "test/spot/narrow.png"), "1 x 900", 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(panda, words, folder, damage):
    spoil, sentence, status = DAMAGES[damage]
    spoil(folder)
    crop = ["--data.crop=center"] if damage in ("wide", "cut away") else []
    found, out = panda(*words, "--data.normal_class=spot", *crop)
    assert sentence in " ".join(out.split())
    assert found == status
    if damage == "strewn":
        assert "empty" not in out


def test_names_that_are_not_utf8_are_shown(panda, words, folder):
    try:
        (folder / "test/stripe/003.png").rename(os.fsdecode(os.fsencode(folder) + b"/test/stripe/caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert panda(*words, "--data.normal_class=spot")[0] == 0
    (folder / "test/spot/copy.png").write_bytes((folder / "train/spot/003.png").read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/test/spot/caf\xe9.png")).write_text("no image", encoding="utf-8")
    status, out = panda(*words, "--data.normal_class=spot")
    assert status == 1
    assert r"test/spot/caf\xe9.png cannot be read: not an image." in out


def test_dicom_without_its_package_says_how_to_get_it(panda, words, folder, monkeypatch):
    dicom(folder / "test/spot/a.dcm", np.full((40, 40), 999))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    status, out = panda(*words, "--data.normal_class=spot")
    assert status == 1
    assert "a.dcm cannot be read: DICOM needs pydicom: pip install 'panda-lightning[dicom]'." in out


@pytest.mark.parametrize("shape", [["--data.crop=none"], ["--data.image_size=[32, 80]"]], ids=["none", "rectangle"])
def test_long_images_are_looked_at_as_they_are_seen(panda, words, workdir, shape):
    for file in sorted((workdir / words[1].split("=")[1]).glob("*/*/0*.png"))[::2]:
        Image.open(file).resize((100, 40)).save(file)
    status, out = panda(*words, *shape)
    assert status == 0
    assert f"decoded at {'32 px on' if 'none' in shape[0] else '32 x 80 px'}" in out
    assert ink(workdir / "check-data-imagefolder.png") > 0.05
