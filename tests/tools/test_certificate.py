"""What a certificate lets pass, and what not."""

import numpy as np
import pytest

from panda_lightning import PandaError
from panda_lightning.formulas.conformal import flagged, p_values
from panda_lightning.tools.certificate import Certificate, compare, compare_maps, generated, scored

CALIBRATION = np.linspace(1.0, 2.0, 39)
SCORES = np.array([0.5, 1.2, 1.3, 1.9, 5.0, 5.0005])


def certificate():
    return Certificate("these", tolerance=1e-4)


def file_of(scores, level=0.05):
    p = p_values(CALIBRATION, scores)
    return {"score": scores, "p_value": p, "anomalous": flagged(p, level)}


def test_differences_within_the_tolerance_pass_and_are_told():
    proof, found = certificate(), SCORES + np.array([1e-4, -5e-5, 0, 0, 4e-4, -2e-4])
    compare(proof, {"score": SCORES}, file_of(found), CALIBRATION, 0.05)
    assert proof.images == 6
    assert proof.unit == 1.5
    assert proof.largest == pytest.approx(8e-5)
    assert proof.reordered == 1  # the last two
    assert proof.redecided == 0


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1.3004])
def test_a_score_beyond_it_is_refused(wrong):
    found = SCORES.copy()
    found[2] = wrong
    with pytest.raises(PandaError, match=r"score of picture 2 is \S+ in the file and 1.3 in the detector"):
        compare(certificate(), {"score": SCORES}, file_of(found), CALIBRATION, 0.05)


def test_small_scores_are_measured_by_the_median_of_normal_ones():
    compare(certificate(), {"score": SCORES * 0}, file_of(SCORES * 0 + 1.4e-4), CALIBRATION, 0.05)
    with pytest.raises(PandaError, match="only 0.0001 is allowed"):
        compare(certificate(), {"score": SCORES * 0}, file_of(SCORES * 0 + 1.6e-4), CALIBRATION, 0.05)


def test_a_wrong_p_value_is_refused_and_one_at_a_tie_is_not():
    found = file_of(SCORES)
    found["p_value"][1] += 1 / 40
    with pytest.raises(PandaError, match="p-value of picture 1"):
        compare(certificate(), {"score": SCORES}, found, CALIBRATION, 0.05)
    threshold = CALIBRATION[-2]  # a score above it is anomalous at .05
    scores, moved = np.array([threshold * (1 - 1e-5)]), np.array([threshold * (1 + 1e-5)])
    proof = certificate()
    compare(proof, {"score": scores}, file_of(moved), CALIBRATION, 0.05)
    assert proof.redecided == 1


def test_a_decision_that_its_own_p_value_contradicts_is_refused():
    found = file_of(SCORES)
    found["anomalous"][0] = True
    with pytest.raises(PandaError, match="decision on picture 0 does not match its p-value"):
        compare(certificate(), {"score": SCORES}, found, CALIBRATION, 0.05)


def test_maps_are_measured_by_their_largest_values():
    proof = certificate()
    compare_maps(proof, np.array([1.0, 2.0, 0.0]), np.array([0.5e-4, 1e-4, 0.5e-4]))
    assert proof.largest_map == pytest.approx(0.5e-4)
    with pytest.raises(PandaError, match="maps differ"):
        compare_maps(proof, np.array([1.0, 2.0, 0.0]), np.array([0, 0, 2e-4]))


def test_pictures_of_several_sizes_keep_their_order():
    pictures = [np.full((2 + i % 2, 3, 3), i, dtype=np.uint8) for i in range(5)]
    found = scored(lambda images: {"score": images.reshape(len(images), -1)[:, 0]}, pictures)
    assert found["score"].tolist() == [0, 1, 2, 3, 4]


def test_generated_pictures_are_the_same_each_time_and_of_many_sizes():
    one, other = generated(), generated()
    assert all(map(np.array_equal, one, other))
    assert len({picture.shape for picture in one}) > 8
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in one)
