import csv
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from panda_lightning import ImageFolder, PandaError
from panda_lightning.datamodules.outliers import near_copies
from panda_lightning.pictures.images import Images
from panda_lightning.tools import main
from tests.conftest import make_folder, picture


@pytest.fixture
def folder(workdir):
    """40 spots to train on; among them two stripes, a mirrored copy, a blank one and a dark one."""
    root = make_folder(workdir / "images", train=40)
    spot = root / "train/spot"
    for n in (0, 1):
        picture("stripe", 50 + n).save(spot / f"stripe{n}.png")
    ImageOps.mirror(Image.open(spot / "003.png")).save(spot / "again.jpg", quality=80)
    Image.new("RGB", (40, 40), (90, 90, 90)).save(spot / "blank.png")
    Image.fromarray((np.asarray(Image.open(spot / "004.png")) * 0.15).astype(np.uint8)).save(spot / "dark.png")
    Image.open(spot / "006.png").save(root / "test/spot/leaked.png")
    return root


def words(folder):
    return [
        "suspects", "--data=ImageFolder", f"--data.root={folder}", "--data.normal_class=spot", "--data.image_size=32",
        "--backbone=panda_tiny", "-o", "s.csv",
    ]  # fmt: skip


def test_what_is_odd_is_listed_and_can_be_left_out(folder, workdir, capsys):
    assert main([*words(folder), "--share=0.15"]) == 0
    rows = {row["path"].rsplit("/", 1)[1]: row for row in csv.DictReader((workdir / "s.csv").open())}
    assert {"stripe0.png", "stripe1.png", "again.jpg", "006.png", "blank.png", "dark.png"} <= set(rows)
    assert float(rows["stripe0.png"]["p_value"]) <= 3 / 45
    assert "train/spot/003.png" in rows["again.jpg"]["copies"]
    assert "test: test/spot/leaked.png" in rows["006.png"]["copies"]
    assert rows["blank.png"]["remarks"] == "blank"
    assert "dark" in rows["dark.png"]["remarks"]
    assert len(rows) < 44  # spots are much alike
    copied = {name for name, row in rows.items() if row["copies"]}
    for name in copied:  # one of each pair may stay
        assert not any(copy.endswith("again.jpg") for copy in rows[name]["copies"].split("; "))
    lines = [json.loads(line) for line in (workdir / "s.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [row["path"] for row in csv.DictReader((workdir / "s.csv").open())]
    assert "45 images: 1 blank, " in capsys.readouterr().out
    assert main(["gallery", "s.jsonl"]) == 0

    data = ImageFolder(str(folder), normal_class="spot", image_size=32, leave_out="s.csv")
    left = set(data.names(data.normal_images))
    assert len(left) == 45 - len(rows)
    with pytest.raises(SystemExit, match=r"s\.csv exists: choose another --output, or remove it"):
        main([*words(folder), "--share=0.15"])  # it may have been shortened by hand
    assert not any(name.rsplit("/", 1)[1] in rows for name in left)


def test_scores_are_those_of_a_plain_loop(folder):
    from panda_lightning import DN2
    from panda_lightning.tools.suspects import suspects

    data = ImageFolder(str(folder), normal_class="spot", image_size=32, crop="squash")
    rows = suspects(data, "panda_tiny", 3)
    detector = DN2("panda_tiny", normalize=True)
    detector.load_networks()
    paths = data.normal_images.paths()
    features = np.concatenate(
        [detector.scoring_space(detector.embed(batch)).detach().numpy() for batch in data.normal_dataloader()]
    )
    gaps = np.square(features[:, None] - features[None]).sum(axis=2)
    np.fill_diagonal(gaps, np.inf)
    expected = np.sort(gaps, axis=1)[:, :3].sum(axis=1)
    for row in rows:
        i = paths.index(row["path"])
        assert row["score"] == pytest.approx(expected[i], rel=1e-4)
        assert row["p_value"] == pytest.approx((expected >= expected[i] * (1 - 1e-6)).mean())
        assert row["neighbours"][0]["path"] == paths[int(gaps[i].argmin())]


@pytest.mark.parametrize("kind", ["text", "names", "table"])
def test_lists_of_paths_and_of_names_are_left_out(folder, workdir, kind):
    names = ["train/spot/001.png", "train/spot/002.png"]
    lines = names if kind == "names" else [str(folder / name) for name in names]
    listing = workdir / ("out.csv" if kind == "table" else "out.txt")
    listing.write_text("\n".join(["path", *lines] if kind == "table" else ["# mine", *lines]))
    data = ImageFolder(str(folder), normal_class="spot", leave_out=str(listing))
    assert set(names).isdisjoint(data.names(data.normal_images))
    assert len(data.normal_images) == 43


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "train/spot/nowhere.png",
            "lists 1 entries, but 1 of them are not normal training images, such as train/spot/nowhere.png",
        ),
        (None, "out.txt is not a list of paths"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(folder, workdir, text, said):
    if text is not None:
        (workdir / "out.txt").write_text(text)
    with pytest.raises(PandaError, match=said):
        _ = ImageFolder(str(folder), normal_class="spot", leave_out="out.txt").normal_images


def test_leaving_nearly_all_out_is_refused(folder, workdir):
    data = ImageFolder(str(folder), normal_class="spot")
    (workdir / "out.txt").write_text("\n".join(data.names(data.normal_images)[1:]))
    data.leave_out = "out.txt"
    with pytest.raises(PandaError, match="leaves only 1 of 45"):
        _ = data.normal_images


def test_too_few_images_for_k_are_refused(folder):
    with pytest.raises(SystemExit, match="k=45 neighbours of an image need 46 images or more, but there are 45"):
        main([*words(folder), "--k=45"])


def test_a_blurred_photograph_is_less_sharp_than_others():
    from sklearn.datasets import load_sample_image

    from panda_lightning.tools.suspects import _look, _remarks

    photo = Image.fromarray(load_sample_image("china.jpg"))
    crops = [photo.crop((x, 200, x + 128, 328)) for x in range(0, 500, 40)]
    crops += [crop.filter(ImageFilter.GaussianBlur(3)) for crop in crops[:3]]
    found = _remarks(_look(np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])))
    assert found == [""] * (len(crops) - 3) + ["blurred"] * 3


def test_pictures_of_one_thing_on_one_ground_are_no_copies():
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 256, (8, 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
    coarse = rng.normal(0, 12, (60, 8, 8, 1)).repeat(8, axis=1).repeat(8, axis=2)
    pixels = (ground + coarse).clip(0, 255).astype(np.uint8)
    images = Images(np.concatenate([pixels, pixels[:1, :, ::-1]]), np.zeros(61, dtype=np.int64))
    ((one, other, alike),) = near_copies(images)
    assert (one, other) == (0, 60)
    assert alike > 0.99


def test_images_that_are_held_back_are_looked_at_too(folder, workdir):
    from panda_lightning.tools.suspects import suspects

    data = ImageFolder(str(folder), normal_class="spot", image_size=32, crop="squash", calibration_fraction=0.5)
    assert len(suspects(data, "panda_tiny", 3)) == 45


def test_a_table_ends_in_csv_and_a_gpu_must_be_there(folder):
    import torch

    with pytest.raises(
        SystemExit, match=r"--output=s.jsonl is not a name for a CSV table: choose a name that ends in .csv"
    ):
        main([*words(folder)[:-1], "s.jsonl"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="accelerator=cuda, but torch finds no GPU here"):
            main([*words(folder), "--accelerator=cuda"])


def test_whole_paths_are_left_out_below_a_relative_root(folder, workdir):
    (workdir / "out.txt").write_text(str(folder.absolute() / "train/spot/001.png"))
    data = ImageFolder("images", normal_class="spot", leave_out="out.txt")
    assert len(data.normal_images) == 44
