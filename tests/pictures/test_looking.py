from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panda_lightning import CatsVsDogs, ImageFolder, PandaError
from panda_lightning.pictures.looking import looks, remarks
from panda_lightning.pictures.view import View
from tests.conftest import picture
from tests.pictures.files import png16, with_orientation

SQUASH = View(32, "squash", 0, "bilinear")
CENTRE = View(28, "center", 32, "bilinear")


def said(paths, view, masks=None):
    """Problems and notes of some files."""
    return remarks(paths, masks, [seen.facts for seen in looks(paths, masks, view, "")], view)


def folder_of(tmp_path: Path, values: np.ndarray, count: int = 3) -> list[Path]:
    for number in range(count):
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(count)]


def test_more_images_than_are_looked_at_together_come_in_their_order(folder):
    data = ImageFolder(str(folder), normal_class="spot", image_size=16)
    images = data.normal_images
    many = images.take(np.arange(3000) % len(images))
    seen = list(looks(many.sources, None, data.view, ""))
    assert len(seen) == 3000
    first = [one.pixels for one in looks(images.sources, None, data.view, "")]
    assert all(np.array_equal(one.pixels, first[i % len(images)]) for i, one in enumerate(seen))


@pytest.mark.parametrize(
    ("most", "dtype", "rule"),
    [
        (1023, np.uint16, "bits:10"),
        (4095, np.uint16, "bits:12"),
        (200, np.uint16, "bits:8"),
        (60, np.uint8, "window:0,60"),
    ],
)
def test_a_set_that_uses_little_of_its_range_is_told_what_to_set(tmp_path, most, dtype, rule):
    files = folder_of(tmp_path, np.linspace(0, most, 1024).reshape(32, 32).astype(dtype))
    (problem,), notes = said(files, SQUASH)
    assert (
        f"lie between 0 and {most} (in 3 of them), so set data.intensity={rule if most != 200 else 'window:0,200'}"
        in problem
    )
    assert not notes
    problems, _ = said(files, View(32, "squash", 0, "bilinear", intensity=rule))
    assert not problems


def test_16_bit_colour_is_told_by_all_its_bits(tmp_path):
    values = np.linspace(0, 4095, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint16)
    (problem,), _ = said([png16(tmp_path / "a.png", values)], SQUASH)
    assert problem.endswith("lie between 0 and 4095 (in 1 of them), so set data.intensity=bits:12.")


def test_one_bright_image_is_enough_for_silence(tmp_path):
    files = folder_of(tmp_path, np.full((32, 32), 500, dtype=np.uint16))
    Image.fromarray(np.full((32, 32), 20000, dtype=np.uint16)).save(tmp_path / "2.png")
    assert said(files, SQUASH) == ([], [])


def test_turned_images_are_counted(tmp_path):
    upright = np.asarray(picture("cloud", 0))
    files = [with_orientation(tmp_path / f"{n}.jpg", upright, n) for n in (1, 6, 8)]
    problems, (note,) = said(files, SQUASH)
    assert not problems
    assert note.startswith("2 of 3 images are rotated as their EXIF orientation says (")
    assert [name in note for name in ("/1.jpg", "/6.jpg", "/8.jpg")] == [False, True, True]


def test_what_the_centre_crop_leaves_out_is_said(tmp_path):
    wide, mask = np.zeros((60, 120, 3), dtype=np.uint8) + 99, np.zeros((60, 120), dtype=np.uint8)
    mask[20:40, 0:40] = 1  # 20 columns of 40 lie within the crop: 120 * (1 - 28 / 32 / 2) / 2 = 33.75 are cut off
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    problems, notes = said([tmp_path / "a.png"], CENTRE, [tmp_path / "m.png"])
    assert problems == []
    assert notes == [
        "the centre crop leaves out 56% of the images' longer side, and 85% of the anomalous pixels; data.crop=squash "
        "keeps everything."
    ]
    mask[:, 33:] = 0
    Image.fromarray(mask).save(tmp_path / "m.png")
    problems, _ = said([tmp_path / "a.png"], CENTRE, [tmp_path / "m.png"])
    assert "1 of 1 masks lose all anomalous pixels in the crop, or at 28 px" in problems[0]
    assert said([tmp_path / "a.png"], SQUASH, [tmp_path / "m.png"]) == ([], [])


def test_masks_that_look_wrong_are_said(tmp_path):
    Image.new("RGB", (40, 40), "grey").save(tmp_path / "a.png")
    empty, large, other = np.zeros((40, 40), np.uint8), np.ones((40, 40), np.uint8), np.ones((20, 40), np.uint8)
    large[:10] = 0
    other[:, 20:] = 0
    other[5:] = 0
    small = np.zeros((40, 40), np.uint8)
    small[:9, :9] = 1
    for name, mask in {"empty": empty, "large": large, "other": other, "small": small}.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")

    def of(*names):
        return said([tmp_path / "a.png"] * len(names), SQUASH, [tmp_path / f"{name}.png" for name in names])

    problems, notes = of("empty", "other", "small", "large", "small")
    assert len(problems) == 2
    assert problems[0].startswith("1 of 5 masks show no anomalous pixel (")
    assert problems[1].startswith("1 of 5 masks do not have the size of their images and are stretched (")
    assert [note.split(" (")[0] for note in notes] == ["1 of 5 masks cover more than half of their image"]
    problems, _ = of("large", "large", "small")
    assert "2 of 3 masks cover more than half of their image; if they are inverted, set data.mask_values" in problems[0]


def test_an_unreadable_mask_is_named_with_its_reason(tmp_path, folder):
    (folder / "ground_truth/stripe").mkdir(parents=True)
    (folder / "ground_truth/stripe/000_mask.png").write_text("no image")
    data = ImageFolder(root=str(folder), normal_class="spot", image_size=32)
    with pytest.raises(PandaError, match=r"stripe/000.png \(its mask 000_mask.png: not an image\)"):
        next(iter(data.test_dataloader()))


def test_published_sets_keep_their_crop():
    assert CatsVsDogs.default_crop == "center"
    assert ImageFolder.default_crop == "squash"
