import numpy as np
import pytest
import torch
from PIL import Image

from panda_lightning.pictures.loose import LooseDataset, pointed_at
from panda_lightning.pictures.view import View
from panda_lightning.types import PandaError
from tests.conftest import picture

VIEW = View(16, "squash", 16, "bilinear")


@pytest.fixture
def photos(tmp_path):
    for name in ("b.png", "a.JPG", "deep/c.png", ".hidden.png", "note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture("spot", len(name)).save(tmp_path / name, format="PNG")
    return tmp_path


def test_a_folder_is_searched_with_its_subfolders(photos):
    found = pointed_at(photos)
    assert found.names == [str(photos / name) for name in ("a.JPG", "b.png", "deep/c.png")]
    assert pointed_at(str(photos)).names == found.names


def test_a_pattern_a_file_and_a_list_name_files(photos, tmp_path, monkeypatch):
    assert pointed_at(f"{photos}/**/*.png").names == [str(photos / name) for name in ("b.png", "deep/c.png")]
    for both in ("**", "**/*"):  # match folders as well as the files in them
        names = pointed_at(f"{photos}/{both}").names
        assert sorted(names) == sorted({*names})
        assert str(photos / "deep/c.png") in names
    assert pointed_at(photos / "note.md").names == [str(photos / "note.md")]  # one that is named is tried
    listing = photos / "all.txt"
    listing.write_text(f"# the first\nb.png\n\n{photos / 'deep/c.png'}\nnowhere.png\n")
    assert pointed_at(listing).names == [str(photos / "b.png"), str(photos / "deep/c.png"), "nowhere.png"]
    monkeypatch.chdir(photos / "deep")
    (photos / "deep/more.txt").write_text("c.png")
    assert pointed_at(["more.txt", photos / "a.JPG"]).names == ["c.png", str(photos / "a.JPG")]


def test_pictures_in_memory_are_called_by_their_numbers():
    image = picture("spot", 1)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    several = pointed_at([image, array, np.stack([array, array]), tensor, torch.stack([tensor, tensor])])
    assert several.names == list("0123456")
    batch = LooseDataset(several, VIEW, threads=False).__getitems__(range(7))
    assert batch["image"].shape == (7, 3, 16, 16)
    assert (batch["image"] == batch["image"][0]).all()


def test_grey_arrays_and_tensors_are_grey_pictures():
    grey = np.asarray(picture("spot", 2).convert("L"))
    both = LooseDataset(pointed_at([grey, torch.from_numpy(grey.copy())]), VIEW, threads=True).__getitems__([0, 1])
    assert (both["image"][0] == both["image"][1]).all()
    assert (both["image"][:, 0] == both["image"][:, 2]).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((4, 4, 3)), r"an array of float64 is not an image.*give \(255 \* x\).round\(\) as uint8"),
        (torch.zeros(3, 4, 4), "a tensor of float32 is not an image"),
        (np.zeros((4, 4), np.uint16), "uint16 .*16-bit PNG"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\) is not an image: give uint8 arrays"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"shape \(4, 4, 3\) .*uint8 tensors \(H, W\), \(3, H, W\)"),
        (3, "int is not an image"),
        (b"\x89PNG", "bytes is not an image"),
        (None, "NoneType is not an image"),
        (np.array(["a.png"]), "or a list of paths"),
        ("", "images is empty: name a folder"),
        ([], "list of images is empty"),
        ("nowhere", "nowhere is not a file or a folder"),
        ("nowhere/*.png", "as a pattern it matches nothing"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(given, said):
    with pytest.raises(PandaError, match=said):
        pointed_at(given)


def test_empty_folders_and_lists_are_refused(tmp_path):
    with pytest.raises(PandaError, match="there are no images in"):
        pointed_at(tmp_path)
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(PandaError, match="lists no images"):
        pointed_at(tmp_path / "none.txt")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PandaError, match="is not a list of paths"):
        pointed_at(tmp_path / "odd.txt")


def test_what_cannot_be_read_is_zeros_with_its_reason(photos):
    (photos / "cut.png").write_bytes((photos / "b.png").read_bytes()[:300])
    (photos / "empty.png").touch()
    found = pointed_at([photos / "b.png", photos / "cut.png", photos / "empty.png", "gone.png"])
    batch = LooseDataset(found, VIEW, threads=False, rows=[0, 1, 2, 3]).__getitems__([0, 1, 2, 3, -1])
    assert batch["unreadable"][0] == ""
    assert all(batch["unreadable"][1:4])
    assert batch["unreadable"][2] == "empty file"
    assert not batch["image"][1:].any()
    assert batch["index"].tolist() == [0, 1, 2, 3, -1]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16", "F", "1", "LA"])
def test_an_opened_image_is_the_picture_of_its_file(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F", "I;16") else "a.png")
    image = picture("spot", 3)
    if mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.float32) / 255)
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(path)
    found = pointed_at([path, Image.open(path)])
    by_path, by_image = LooseDataset(found, VIEW, threads=False).__getitems__([0, 1])["image"]
    assert (by_path == by_image).all()
    assert by_path.float().std() > 5


def test_an_opened_image_is_turned_as_its_tag_says(tmp_path):
    image = picture("stripe", 4).crop((0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    found = pointed_at([tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")])
    by_path, by_image = LooseDataset(found, VIEW, threads=False).__getitems__([0, 1])["image"]
    assert (by_path == by_image).all()


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    try:
        (tmp_path / "a.png").touch()
        (tmp_path / "a.png").rename(bytes(tmp_path).decode() + "/caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (name,) = pointed_at(tmp_path).names
    assert name.endswith(r"caf\xe9.png")
    name.encode()
