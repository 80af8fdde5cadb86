"""Banks that grow and shrink: as if they had been built so."""

import numpy as np
import pytest
import torch

from panda_lightning import PandaError
from panda_lightning.detectors import banks
from panda_lightning.detectors.exported import from_checkpoint
from panda_lightning.runtime.checkpoints import read_tensors
from panda_lightning.tools import export, main
from tests.conftest import make_clouds, make_folder, picture
from tests.detectors.test_scoring import images, learned
from tests.test_any_order import DETECTORS, trainer

GROWING = ("DN2", "DN2, centroids", "PANDA", "MSC", "SPADE", "PatchCore")


@pytest.fixture
def made(workdir):
    """Makes a detector's checkpoint from a folder of relative paths; spots beside it are new."""
    make_folder(workdir / "images")
    for name, first in (("a", 300), ("b", 400)):
        (workdir / name).mkdir()
        for n in range(first, first + 3):
            picture("spot", n).save(workdir / name / f"{n}.png")

    def call(name, root="images", **options):
        detector = DETECTORS[name]()
        learned(detector, images(root, **options), workdir).save_checkpoint(f"{root}-{name}.ckpt")
        return workdir / f"{root}-{name}.ckpt"

    return call


def state(path):
    return read_tensors(path)["state_dict"]["_extra_state"]["derived"]


def bank(*words):
    return main(["bank", *map(str, words)])


@pytest.mark.parametrize("name", ["DN2", "DN2, centroids", "SPADE"])
def test_two_additions_are_a_bank_that_was_built_from_all(made, workdir, name):
    path = made(name, calibration_fraction=0.4)
    assert bank("add", f"--ckpt_path={path}", "--images=a", "-o", "one.ckpt") == 0
    assert bank("add", "--ckpt_path=one.ckpt", "--images=b", "-o", "two.ckpt") == 0
    before, after = state(path), state("two.ckpt")
    assert after["bank_names"] == [*before["bank_names"], *(f"a/{n}.png" for n in (300, 301, 302)),
                                   *(f"b/{n}.png" for n in (400, 401, 402))]  # fmt: skip
    assert torch.equal(after["bank"][: len(before["bank"])], before["bank"])

    # the same images, in this order, as training images
    for i, source in enumerate(after["bank_names"]):
        target = workdir / f"whole/train/spot/{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((workdir / source).read_bytes())
    (workdir / "whole/test").symlink_to(workdir / "images/test")
    built = made(name, "whole")
    torch.testing.assert_close(after["bank"], state(built)["bank"], rtol=1e-5, atol=1e-6)
    pictures = sorted((workdir / "images/test").rglob("*.png"))
    one, other = (from_checkpoint(p).score(pictures) for p in ("two.ckpt", built))
    np.testing.assert_allclose(one.score, other.score, rtol=1e-4)


@pytest.mark.parametrize("name", ["DN2", "DN2, centroids", "PANDA"])
def test_search_and_calibration_follow_bit_for_bit(made, workdir, name):
    path = made(name, calibration_fraction=0.4)
    bank("add", f"--ckpt_path={path}", "--images=a", "-o", "one.ckpt")
    changed = from_checkpoint("one.ckpt")
    assert changed.calibration.kind == "held out"
    expected = from_checkpoint(path)
    before = expected.calibration.scores
    expected.bank_names = changed.bank_names
    expected.bank, expected.reduction = changed.bank, None  # equal rows, in a detector that was never changed
    expected.fit_index()
    with torch.no_grad():
        scores = expected._neighbours(expected.held_features, expected.k)[0].sum(dim=1)
    np.testing.assert_array_equal(changed.calibration.scores, scores.double().numpy())
    if name != "DN2, centroids":
        assert (changed.calibration.scores <= before).all()
        assert (changed.calibration.scores < before).any()
    pictures = sorted((workdir / "images/test").rglob("*.png"))
    np.testing.assert_array_equal(changed.score(pictures).score, expected.score(pictures).score)


@pytest.mark.parametrize("name", GROWING)
def test_what_was_added_goes_without_a_trace(made, workdir, name, capsys):
    path = made(name, calibration_fraction=0.4)
    bank("add", f"--ckpt_path={path}", "--images=a", "-o", "one.ckpt")
    assert "3 added, 10 normal images in its bank." in capsys.readouterr().out
    bank("remove", "--ckpt_path=one.ckpt", "--like=a/*", "-o", "back.ckpt")
    out = capsys.readouterr().out
    assert "3 removed, 7 normal images in its bank." in out
    assert ("adapted weights and their centre" in out) == (name in ("PANDA", "MSC"))
    one, other = state(path), state("back.ckpt")
    for key in ("bank", "bank_names", "bank_images", "held_features", "centre", "bank_weights"):
        if torch.is_tensor(one.get(key)):
            assert torch.equal(one[key], other[key]), key
        else:
            assert one.get(key) == other.get(key), key
    assert other["bank_changes"] == ([], [])
    forgotten = name in ("SPADE", "PatchCore")
    assert (other["held_out"] is None) == forgotten
    pictures = sorted((workdir / "images/test").rglob("*.png"))
    before, after = (from_checkpoint(p).score(pictures, alpha=None) for p in (path, "back.ckpt"))
    np.testing.assert_array_equal(before.score, after.score)
    assert (after.p_value is None) == forgotten
    if not forgotten:
        np.testing.assert_array_equal(before.p_value, after.p_value)


def test_original_images_can_go_too_and_a_changed_bank_is_exported(made, workdir, capsys):
    path = made("DN2", calibration_fraction=0.4)
    gone = state(path)["bank_names"][:2]
    (workdir / "bad.txt").write_text("\n".join(gone) + "\n")
    bank("remove", f"--ckpt_path={path}", "--like=bad.txt", "-o", "less.ckpt")
    bank("add", "--ckpt_path=less.ckpt", f"--images={gone[0]}", "-o", "more.ckpt")
    assert state("more.ckpt")["bank_changes"] == ([gone[0]], gone)
    assert torch.equal(state("more.ckpt")["bank"][:-1], state(path)["bank"][2:])
    capsys.readouterr()
    bank("list", "--ckpt_path=more.ckpt")
    assert capsys.readouterr().out.splitlines() == [*state(path)["bank_names"][2:], gone[0]]
    assert export.export(workdir / "more.ckpt", workdir / "more.onnx").largest < 1e-5


def test_a_changed_checkpoint_is_tested_and_not_trained_on(made, workdir):
    path = made("PANDA")
    bank("add", f"--ckpt_path={path}", "--images=a", "-o", "one.ckpt")
    detector = DETECTORS["PANDA"]()
    trainer(workdir).test(detector, images("images"), ckpt_path="one.ckpt", verbose=False)
    assert len(detector.bank) == 14
    np.testing.assert_allclose(
        detector.scores.score, from_checkpoint("one.ckpt").score(sorted(workdir.glob("images/test/*/*.png"))).score,
        rtol=1e-5,
    )  # fmt: skip
    with pytest.raises(PandaError, match="has only weights"):
        trainer(workdir, 4).fit(DETECTORS["PANDA"](), images("images"), ckpt_path="one.ckpt")


def test_a_coreset_keeps_what_it_was_chosen_for(made, workdir):
    path = made("PatchCore")
    before = state(path)
    bank("add", f"--ckpt_path={path}", "--images=a", "-o", "one.ckpt")
    after = state("one.ckpt")
    patches = len(after["bank"]) - len(before["bank"])
    assert patches == 3 * 2 * len(before["bank"]) / 11  # all of theirs, where half of the others' were kept
    assert after["bank_images"][-1] == 13
    with pytest.raises(PandaError, match="coreset=0.5 was chosen from the patches of all its images"):
        banks.remove(from_checkpoint("one.ckpt"), ["000.png"])
    near = from_checkpoint("one.ckpt").score("a/301.png")
    assert near.neighbours[0, 0] == "a/301.png"
    assert near.distances[0, 0] < 1e-4


@pytest.mark.parametrize("name", ["OC-SVM", "Deep SVDD", "RotNet", "PANDA-OE"])
def test_methods_without_such_a_bank_say_so(made, workdir, name):
    path = made(name, outliers=str(make_clouds(workdir / "clouds", 8)) if name == "PANDA-OE" else None)
    for words in (("add", "--images=a"), ("remove", "--like=*")):
        with pytest.raises(SystemExit) as ended:
            bank(*words, f"--ckpt_path={path}", "-o", "one.ckpt")
        assert "has no bank of images" in str(ended.value.code)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("remove", "--like=00[0-9].png", "-o", "y"), "1 of 11 normal images would be left, fewer than k=2"),
        (("remove", "--like=nobody", "-o", "y"), "nobody matches none of the 11 normal images, such as images/train"),
        (("add", "--images=images/train", "-o", "y"), "images/train/spot/000.png is already in the bank"),
        (
            ("add", "--images=images/../images/train/spot/001.png", "-o", "y"),
            "shows the same as images/train/spot/001.png",
        ),
        (("add", "--images=nothing", "-o", "y"), "nothing is not a file or a folder"),
        (("add", "--images=c", "-o", "y"), "c/broken.png cannot be read"),
        (("add", "-o", "y"), "`panda bank add` needs --images"),
        (("add", "--images=a"), "`panda bank add` needs --output"),
        (("add", "--images=a", "--like=x", "-o", "y"), "`panda bank add` takes no --like"),
        (("list", "-o", "y"), "`panda bank list` takes no --output"),
        (("add", "--images=a", "-o", "there.ckpt"), "there.ckpt exists: choose another --output"),
    ],
)
def test_what_is_not_possible_ends_in_a_sentence(made, workdir, words, said):
    path = made("DN2")
    (workdir / "c").mkdir()
    (workdir / "c/broken.png").write_text("no picture")
    picture("spot", 7).save(workdir / "c/a.png")
    (workdir / "there.ckpt").write_text("mine")
    for number in (8, 9, 10):
        assert (workdir / f"images/train/spot/{number:03d}.png").is_file()
    with pytest.raises(SystemExit) as ended:
        bank(words[0], f"--ckpt_path={path}", *words[1:])
    assert said in str(ended.value.code)
    assert not (workdir / "y").exists()
    assert (workdir / "there.ckpt").read_text() == "mine"


def test_what_p_values_rest_on_cannot_join(made, workdir):
    path = made("DN2", calibration_fraction=0.4)
    known = {str((workdir / name).resolve()) for name in state(path)["bank_names"]}
    held = [str(p) for p in sorted(workdir.glob("images/train/spot/*.png")) if str(p.resolve()) not in known]
    assert len(held) == 4
    with pytest.raises(PandaError, match="was held back for p-values, so it cannot be in the bank too"):
        banks.add(from_checkpoint(path), held[0])


@pytest.mark.parametrize("name", ["DN2", "SPADE"])
def test_a_picture_that_is_there_under_another_name_is_refused(made, workdir, name):
    path = made(name)
    copied = workdir / "copy.png"
    copied.write_bytes((workdir / "images/train/spot/003.png").read_bytes())
    with pytest.raises(PandaError, match=r"copy\.png shows the same as .*images/train/spot/003\.png of the bank"):
        banks.add(from_checkpoint(path), ["a/300.png", "copy.png"])
    (workdir / "a/other.png").write_bytes((workdir / "a/301.png").read_bytes())
    with pytest.raises(PandaError, match=r"a/other\.png shows the same as a/301\.png: leave one of them out"):
        banks.add(from_checkpoint(path), "a")
    (workdir / "link").symlink_to(workdir / "images")
    with pytest.raises(PandaError, match=r"link/train/spot/000\.png shows the same as .* of the bank"):
        banks.add(from_checkpoint(path), "link/train")


def test_a_new_image_may_have_the_name_of_an_old_one_by_its_whole_path(made, workdir, monkeypatch):
    detector = from_checkpoint(made("DN2"))
    banks.add(detector, "a/300.png")
    (workdir / "day2/a").mkdir(parents=True)
    (workdir / "day2/a/300.png").write_bytes((workdir / "b/400.png").read_bytes())
    monkeypatch.chdir(workdir / "day2")
    with pytest.raises(PandaError, match=r"a/300\.png is already .* another image of the same name, give its absolute"):
        banks.add(detector, "a/300.png")
    assert banks.add(detector, workdir / "day2/a/300.png") == [str(workdir / "day2/a/300.png")]
    with pytest.raises(PandaError, match=r"300\.png is already in the bank"):
        banks.add(detector, workdir / "day2/a/300.png")


def test_a_name_is_itself_before_it_is_a_pattern(made, workdir):
    (workdir / "b/4[01]1.png").write_bytes((workdir / "b/400.png").read_bytes())
    (workdir / "b/400.png").unlink()
    detector = from_checkpoint(made("DN2"))
    banks.add(detector, "b")
    assert banks.remove(detector, ["b/4[01]1.png"]) == ["b/4[01]1.png"]
    assert banks.remove(detector, ["b/4[01]1.png"]) == ["b/401.png"]


def test_nothing_has_changed_where_an_addition_fails(made, workdir):
    detector = from_checkpoint(made("DN2"))
    (workdir / "a/zz.png").write_text("no picture")
    before = detector.bank
    with pytest.raises(PandaError, match=r"zz\.png cannot be read"):
        banks.add(detector, "a", batch_size=2)
    assert detector.bank is before
    assert len(detector.bank_names) == 11
