import hashlib
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning import PandaError
from panda_lightning.datamodules.hyper_kvasir import HyperKvasir, canonical
from tests.datamodules.official_medical_aerial import make_labeled, make_segmented

COUNTS = {"cecum": 5, "ileum": 2, "bbps-2-3": 4, "polyps": 3, "pylorus": 2}
NORMALS = {f"{name}_{n:03d}" for name in ("cecum", "ileum", "bbps-2-3") for n in range(COUNTS[name])}
SPELLINGS = {
    "folders": {"cecum": "cecum", "ileum": "ileum", "bbps-2-3": "bbps-2-3", "polyps": "polyps", "pylorus": "pylorus"},
    "split": {
        "cecum": "normal-cecum",
        "ileum": "ileum",
        "bbps-2-3": "bbps-2-3",
        "polyps": "polyp",
        "pylorus": "normal-pylorus",
    },
    "readme": {
        "cecum": "Cecum",
        "ileum": "Terminal ileum",
        "bbps-2-3": "BBPS 2-3",
        "polyps": "Polyps",
        "pylorus": "Pylorus",
    },
}


def module(root, **words):
    return HyperKvasir(**{"root": str(root), "test_normals": 4, "image_size": 16, "crop": "squash", **words})


def split_of(data):
    data.setup("fit")
    test = data.test_images
    return [p.stem for p in data.normal_images.sources], [p.stem for p in np.array(test.sources)[test.targets == 0]]


@pytest.fixture
def kvasir(tmp_path):
    make_labeled(tmp_path, COUNTS)
    make_segmented(tmp_path)
    return tmp_path


def write_csv(path, spelling, official):
    rows = [(f"{name}_{n:03d}", SPELLINGS[spelling][name]) for name, count in COUNTS.items() for n in range(count)]
    if official:
        path.write_text("file-name;class-name;split-index\n" + "".join(f"{a}.jpg;{b};0\n" for a, b in rows))
    else:
        lines = [f"{a},Lower GI,{b},anatomical-landmarks\n" for a, b in rows]
        path.write_text("Video file,Organ,Finding,Classification\n" + "".join(lines))


def test_folders_give_normals_and_polyps(kvasir):
    data = module(kvasir)
    train, test = split_of(data)
    assert (len(train), len(test)) == (7, 4)
    assert {*train, *test} == NORMALS
    assert train == sorted(train)
    assert [p.parent.name for p in data.test_images.sources[4:]] == ["images"] * 3
    assert data.test_images.targets.tolist() == [0] * 4 + [1] * 3
    assert data.test_images.problems == ()
    assert data.hparams.test_normals == 4
    assert data.normal_class == "normal"


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("official", [True, False])
def test_flat_images_are_told_apart_by_csv(tmp_path, kvasir, spelling, official):
    flat = tmp_path / "flat"
    make_labeled(flat, COUNTS, flat=True)
    make_segmented(flat)
    path = flat / ("2_fold_split.csv" if official else "labeled-images/image-labels.csv")
    write_csv(path, spelling, official)
    assert split_of(module(flat)) == split_of(module(kvasir))


@pytest.mark.parametrize("inner", ["hyper-kvasir", "labeled-images"])
def test_a_folder_more(tmp_path, kvasir, inner):
    expected = split_of(module(kvasir))
    if inner == "labeled-images":
        (tmp_path / "labeled-images").rename(tmp_path / "x")
        (tmp_path / "labeled-images").mkdir()
        (tmp_path / "x").rename(tmp_path / "labeled-images/labeled-images")
    else:
        (tmp_path / inner).mkdir()
        for name in ("labeled-images", "segmented-images"):
            (tmp_path / name).rename(tmp_path / inner / name)
    assert split_of(module(kvasir)) == expected


def test_canonical_names():
    assert {canonical(SPELLINGS[s]["cecum"]) for s in SPELLINGS} == {"cecum"}
    assert {canonical(SPELLINGS[s]["bbps-2-3"]) for s in SPELLINGS} == {"bbps23"}
    assert canonical("bbps-0-1") != canonical("bbps-2-3")


def test_the_split_is_a_rule_of_names_alone(kvasir):
    train, test = split_of(module(kvasir))
    ranked = sorted(NORMALS, key=lambda name: hashlib.sha256(f"0/{name}".encode()).hexdigest())
    assert test == sorted(ranked[:4])
    make_labeled(kvasir, {"polyps": 9, "pylorus": 9})
    assert split_of(module(kvasir)) == (train, test)
    other = split_of(module(kvasir, split_seed=1))[1]
    assert other != test
    make_labeled(kvasir, {"cecum": 15})  # new normal images move none from train to test
    assert not {*train} & {*split_of(module(kvasir))[1]}


def test_masks_are_paired_and_thresholded(kvasir):
    drawn = np.zeros((20, 24), dtype=np.uint8)
    drawn[:10] = 128  # just polyp
    drawn[10:] = 127  # just not
    Image.fromarray(drawn).save(kvasir / "segmented-images/masks/polyp1.jpg", quality=100)
    data = module(kvasir)
    data.setup("fit")
    batch = next(iter(data.test_dataloader()))
    mask = batch["mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == (7, 16, 16)
    assert not mask[:4].any()
    assert [m.float().mean().item() for m in mask[4:]] == pytest.approx([0.5] * 3, abs=0.07)
    assert mask[4, :, :7].all()  # the left half
    assert not mask[4, :, 9:].any()
    assert mask[5, :7].all()  # the upper half: polyp1's own
    assert not mask[5, 9:].any()


def test_margins_are_cropped_of_image_and_mask(kvasir):
    size = 512
    edge = np.full((size, size), 255, dtype=np.uint8)
    edge[45:475, 45:475] = 0  # margins white, the part that is kept black
    for folder in ("images", "masks"):
        Image.fromarray(edge).save(kvasir / f"segmented-images/{folder}/polyp0.jpg", quality=100)

    def polyp(**words):
        data = module(kvasir, image_size=64, **words)
        data.setup("fit")
        batch = next(iter(data.test_dataloader()))
        return batch["image"][4].float(), batch["mask"][4]

    image, mask = polyp()
    assert image.max() < 40
    assert not mask.any()
    image, mask = polyp(crop_margins=False)
    assert image[:, :4].min() > 215
    assert mask[:5].all()
    assert mask[-4:].all()  # 37 of 512 pixels below
    assert not mask[8:56, 8:56].any()


def test_a_csv_row_without_a_file_is_a_problem(kvasir):
    write_csv(kvasir / "2_fold_split.csv", "split", official=True)
    (kvasir / "labeled-images/lower-gi-tract/anatomical-landmarks/cecum/cecum_003.jpg").unlink()
    (kvasir / "labeled-images/lower-gi-tract/pathological-findings/polyps/polyps_001.jpg").unlink()  # not used
    (problem,) = module(kvasir).read("train").problems
    assert problem.startswith("1 of the 11 normal images in the CSV files of labels have no file in ")
    assert "(cecum_003)" in problem


def test_a_missing_mask_leaves_image_scores(kvasir):
    (kvasir / "segmented-images/masks/polyp1.jpg").unlink()
    data = module(kvasir)
    with pytest.warns(UserWarning, match=r"1 of 3 anomalous images have no mask, so .*: .*images/polyp1\.jpg"):
        data.setup("fit")
    batch = next(iter(data.test_dataloader()))
    assert batch["has_mask"].tolist() == [*(batch["label"] == 0).tolist()[:-3], True, False, True]
    assert batch["mask"].flatten(1).any(dim=1).tolist()[-3:] == [True, False, True]


STEPS = r"agree to the terms at https://datasets.simula.no/hyper-kvasir.*labeled-images/lower-gi-tract/\*/<class>"


def test_what_is_missing_is_said_with_the_steps(tmp_path):
    data = module(tmp_path)
    for split in ("train", "test"):
        with pytest.raises(PandaError, match=STEPS):
            data.read(split)
    make_segmented(tmp_path)
    with (
        pytest.warns(UserWarning, match=f"no images in .*/labeled-images: {STEPS}"),
        pytest.raises(PandaError, match="all anomalous"),
    ):
        module(tmp_path).setup("test")
    make_labeled(tmp_path, COUNTS, flat=True)  # and no CSV to tell them apart
    with pytest.raises(PandaError, match=STEPS):
        module(tmp_path).read("train")


def test_a_test_that_takes_all_is_refused(kvasir):
    with pytest.raises(PandaError, match="test_normals=11 of 11 normal images leaves none to train on: choose fewer"):
        module(kvasir, test_normals=11).setup("fit")


def test_real_polyps(shared, tmp_path):
    subprocess.run([shared / "data/unpack", tmp_path, "hyper_kvasir"], check=True, capture_output=True)
    root = tmp_path / "hyper_kvasir"
    make_labeled(root, COUNTS)
    data = module(root, test_limit=None)
    with pytest.warns(UserWarning, match="2166 of the 2166 normal images in the CSV files"):
        data.setup("fit")
    assert (len(data.normal_images), len(data.test_images)) == (7, 104)
    batch = next(iter(data.test_dataloader()))
    assert batch["label"].tolist() == [0] * 4 + [1] * 100
    share = batch["mask"].float().mean((1, 2))
    assert not share[:4].any()
    assert 0.1 < share[4:].mean() < 0.3  # polyps cover some of an image
    # Nearly every polyp is brighter than what surrounds it; under another's mask (all shifted by one) 81 % are.
    image, mask = batch["image"][4:].float().mean(1), batch["mask"][4:]
    inside = [i[m].mean() > i[~m].mean() for i, m in zip(image, mask, strict=True) if m.any()]
    assert np.mean(inside) > 0.9
