from pathlib import Path

import numpy as np
import pytest

from panda_lightning import DN2, Digits, PandaError
from panda_lightning.datamodules import choices
from panda_lightning.pictures.images import Images
from tests.conftest import picture
from tests.datamodules.test_folder import normal_class
from tests.detectors.test_scoring import images, learned


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_a_fraction_that_leaves_too_few_is_refused(tmp_path, folder, share):
    with pytest.raises(PandaError, match="gives 2 or more images to both"):
        learned(DN2("panda_tiny"), images(folder, calibration_fraction=share), tmp_path)


def test_an_arrays_images_are_held_back_by_their_rows(tmp_path):
    data = Digits(normal_class=3, image_size=32, calibration_fraction=0.5, train_limit=10)
    train, held = data.names(data.normal_images), data.names(data.calibration_images)
    assert len(train) == len(held) == 5
    assert set(train).isdisjoint(held)


def test_limits_are_evenly_spaced():
    data = Digits(normal_class=0, train_limit=10, test_limit=50)
    data.setup("fit")
    assert (len(data.normal_images), len(data.test_images)) == (10, 50)
    assert len(set(data.test_images.targets)) == 10


def test_a_number_is_a_name_where_classes_are_named_by_numbers(tmp_path):
    for name in ("0", "01", "2", "10"):
        (tmp_path / f"train/{name}").mkdir(parents=True)
        picture("spot", 1).save(tmp_path / f"train/{name}/a.png")
    for wanted, name in (("2", "2"), (2, "2"), ("01", "01"), (1, "01"), (10, "10"), ("0", "0")):
        assert normal_class(tmp_path, wanted) == name
    for wanted in (3, "3"):  # though there is a fourth folder
        with pytest.raises(PandaError, match=r"normal_class=3 is not a class of ImageFolder \(0-3: 0, 01, 10, 2\)"):
            normal_class(tmp_path, wanted)
    (tmp_path / "train/1").mkdir()
    picture("spot", 1).save(tmp_path / "train/1/a.png")
    assert normal_class(tmp_path, 1) == "1"


def test_a_number_counts_classes_that_have_other_names(folder):
    assert normal_class(folder, 1) == "stripe"


def test_fewer_shots_are_among_more_and_another_seed_draws_others():
    images = Images(np.zeros((40, 1, 1, 3), dtype=np.uint8), np.zeros(40, dtype=np.int64))
    few, more, other = (
        choices.drawn(images, shots, seed, Path()).rows.tolist() for shots, seed in ((5, 0), (20, 0), (20, 1))
    )
    assert few == sorted(set(few))
    assert len(few) == 5
    assert set(few) < set(more) != set(other)
    with pytest.raises(PandaError, match="shots=41, but there are 40 normal training images"):
        choices.drawn(images, 41, 0, Path())


def test_a_class_that_comes_from_the_detector_is_named():
    with pytest.raises(
        PandaError, match="normal_class=good, with which the detector was trained, is not a class of Dig"
    ):
        choices.class_number("good", Digits(normal_class=None))
