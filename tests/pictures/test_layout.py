import gc
import os
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from panda_lightning.pictures.layout import (
    Files,
    folders_in,
    images_below,
    listed,
    masks_of,
    named,
    passed_over,
    readable,
    relative,
)
from tests.conftest import picture


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_endings_are_read_alike_and_others_are_counted(tmp_path):
    names = ["a.PNG", "b.JPG", "c.jfif", "d.bmp", "e.gif", "f.avif", "g.tif", "h.TIFF", "i.webp", "j.dcm", "k.png"]
    touch(*(tmp_path / name for name in names))
    touch(tmp_path / "x.heic", tmp_path / "y.HEIC", tmp_path / "deep/z.txt", tmp_path / "noending")
    images, others = listed(tmp_path)
    assert [path.name for path in images] == names
    assert others == {".heic": 2, ".txt": 1, "without ending": 1}
    (note,) = passed_over(others)
    assert note.startswith("4 files are ignored: .heic 2, ")
    assert passed_over(listed(tmp_path / "nothing")[1]) == ()


def test_a_systems_own_files_and_folders_do_not_count(tmp_path):
    touch(tmp_path / "good/a.png")
    for junk in (".hidden/a.png", "__MACOSX/good/._a.png", ".ipynb_checkpoints/a-checkpoint.png", "good/._a.png",
                 "good/.DS_Store", "good/Thumbs.db", "good/.ipynb_checkpoints/a.png"):  # fmt: skip
        touch(tmp_path / junk)
    assert [path.name for path in folders_in(tmp_path)] == ["good"]
    images, others = listed(tmp_path)
    assert list(images) == [tmp_path / "good/a.png"]
    assert not others


def test_links_are_followed_and_loops_and_dead_links_counted(tmp_path):
    touch(tmp_path / "root/a.png", tmp_path / "elsewhere/b.png", tmp_path / "elsewhere/deep/c.png")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/link.png").symlink_to(tmp_path / "elsewhere/b.png")
    (tmp_path / "root/dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere/deep")  # twice, but no loop
    images, others = listed(tmp_path / "root")
    names = [path.relative_to(tmp_path / "root").as_posix() for path in images]
    assert names == ["a.png", "link.png", "linked/again/c.png", "linked/b.png", "linked/deep/c.png"]
    assert others == {"dead links": 1, "links to a folder above": 2}


def test_a_link_out_of_a_class_folder_to_those_above_is_not_followed(tmp_path):
    touch(tmp_path / "test/good/a.png", tmp_path / "test/bad/b.png")
    (tmp_path / "test/good/up").symlink_to(tmp_path / "test")
    (tmp_path / "test/good/top").symlink_to(tmp_path)
    images, others = listed(tmp_path / "test/good")
    assert [path.name for path in images] == ["a.png"]
    assert others == {"links to a folder above": 2}


def test_files_and_folders_are_sorted_by_the_parts_of_their_paths(tmp_path):
    names = ("b.png", "a/z.png", "a-c.png", "a/b/c.png", "c/d.png", "B.png", "a.png", "é.png")
    touch(*(tmp_path / name for name in names))
    images, _ = listed(tmp_path)
    assert list(images) == sorted(tmp_path.rglob("*.png"))


def test_a_folder_without_leave_to_read_is_passed_over(tmp_path, monkeypatch):
    touch(tmp_path / "a.png", tmp_path / "shut/b.png")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "shut":
            raise PermissionError(folder)
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert list(listed(tmp_path)[0]) == [tmp_path / "a.png"]


def test_files_are_a_sequence_of_paths(tmp_path):
    paths = [tmp_path / name for name in ("a/1.png", "b/2.png", "a/longer name.png")]
    touch(*paths)
    files = Files.of(paths)
    assert list(files) == paths
    assert files[-1] == paths[2]
    assert list(files[1:]) == paths[1:]
    assert list(files.take(np.array([2, 0]))) == [paths[2], paths[0]]
    assert list(Files.joined([files[:1], files.take(np.array([], dtype=int)), files[1:]])) == paths
    assert list(Files.joined([])) == []
    with pytest.raises(IndexError):
        files[3]
    with pytest.raises(FileNotFoundError):
        Files.of([tmp_path / "none.png"])


def test_files_are_named_as_their_paths_are(tmp_path, monkeypatch):
    touch(tmp_path / "a/b/1.png", tmp_path / "2.png")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path(".")):
        files, _ = listed(folder)
        assert files.names(readable) == [readable(path) for path in files]
        for root in (tmp_path, tmp_path / "a", Path("a"), tmp_path / "elsewhere"):
            assert files.names(lambda path, root=root: relative(path, root)) == [relative(path, root) for path in files]


def test_ten_thousand_files_take_little_memory_and_one_look_at_each_folder(tmp_path, monkeypatch):
    touch(tmp_path / "source")
    for folder in ("a", "a/deep", "b"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    for number in range(10_000):
        os.link(tmp_path / "source", tmp_path / "train" / ("a", "a/deep", "b")[number % 3] / f"n{number:08d}.JPEG")
    seen, scandir = Counter(), os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: (seen.update([str(folder)]), scandir(folder))[1])
    listed(tmp_path)  # what is made once
    seen.clear()
    tracemalloc.start()
    files, _ = listed(tmp_path / "train")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(files) == 10_000
    assert held < 50 * 10_000  # bytes; a list of paths takes some 500 each
    assert peak < 400 * 10_000
    assert seen == {str(tmp_path / name): 1 for name in ("train", "train/a", "train/a/deep", "train/b")}
    paths = (one for one in gc.get_objects() if isinstance(one, Path))
    assert not any(path.suffix == ".JPEG" and path.is_relative_to(tmp_path) for path in paths)


def test_folders_are_found_in_upper_and_lower_case(tmp_path):
    touch(tmp_path / "Train/a.png")
    assert named(tmp_path, "train") == tmp_path / "Train"
    assert named(tmp_path, "test") == tmp_path / "test"


def test_file_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    picture("spot", 0).save(tmp_path / "a.png")
    try:
        shutil.copy(tmp_path / "a.png", path)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert len(images_below(tmp_path)) == 2


@pytest.mark.parametrize(
    ("image", "mask", "found"),
    [
        ("a.png", "a_mask.png", True),
        ("a.png", "a.png", True),
        ("a.jpg", "a_mask.bmp", True),
        ("a.jpg", "a_mask.TIF", True),
        ("A.PNG", "a_MASK.png", True),
        ("deep/a.png", "deep/a_mask.jpg", True),
        ("a.b.png", "a.b_mask.png", True),
        ("a.png", "ab_mask.png", False),
        ("deep/a.png", "a_mask.png", False),
    ],
)
def test_masks_are_found_by_name(tmp_path, image, mask, found):
    touch(tmp_path / "test" / image, tmp_path / "masks" / mask)
    expected = [tmp_path / "masks" / mask] if found else [None]
    assert masks_of([tmp_path / "test" / image], tmp_path / "test", tmp_path / "masks") == expected


def test_a_mask_of_the_very_name_comes_first(tmp_path):
    touch(*(tmp_path / "masks" / name for name in ("a.png", "a_mask.png", "A_mask.png")))
    assert masks_of([tmp_path / "t/A.png"], tmp_path / "t", tmp_path / "masks") == [tmp_path / "masks/A_mask.png"]
    assert masks_of([tmp_path / "t/a.png"], tmp_path / "t", tmp_path / "masks") == [tmp_path / "masks/a_mask.png"]


def test_a_mask_of_another_image_is_not_taken_for_its_name_in_other_case(tmp_path):
    touch(tmp_path / "masks/A_mask.png")
    found = masks_of([tmp_path / "t/A.png", tmp_path / "t/a.png"], tmp_path / "t", tmp_path / "masks")
    assert found == [tmp_path / "masks/A_mask.png", None]
