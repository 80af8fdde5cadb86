import warnings
from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from panda_lightning import PandaError, auroc
from panda_lightning.formulas.uncertainty import (
    Estimate,
    aurocs,
    average_precision,
    delong,
    difference,
    fpr_at_tpr,
    friedman,
    holm,
    interval,
    joined,
    nemenyi_difference,
    reliable,
    resamples,
    wilcoxon_holm,
)

# AUROCs of C4.5 and three variants of it on 14 data sets: Demsar, JMLR 2006, table 6,
# whose ranks tell .975 and .975 apart
DEMSAR = np.array([
    [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
    [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
    [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
    [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.97501, 0.975], [0.957, 0.978, 0.946, 0.970],
])  # fmt: skip


def images(seed, normal=60, anomalous=40, apart=1.0, levels=None):
    """Scores of two methods that see the same images, and labels, in any order."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(normal + anomalous) < anomalous)
    common = rng.normal(size=len(label)) + apart * label
    one, other = (common + 0.5 * rng.normal(size=len(label)) for _ in range(2))
    if levels:
        one, other = np.round(one * levels), np.round(other * levels)
    return one, other, label


def classes(seed, each=25, count=4):
    """Scores (count, N) of two methods, labels (count, N) of each class against the rest, and own classes."""
    rng = np.random.default_rng(seed)
    own = rng.permutation(np.repeat(np.arange(count), each))
    points = rng.normal(size=(len(own), 3)) + rng.normal(size=(count, 3))[own]
    centres = np.stack([points[own == c].mean(axis=0) for c in range(count)])
    away = points - centres[:, None]
    return np.square(away).sum(axis=2), np.abs(away).max(axis=2), own != np.arange(count)[:, None], own


def wins(score, label):
    """What each pair of an anomalous and a normal image counts, (anomalous, normal), by a plain loop."""
    return np.array([[(a > b) + (a == b) / 2 for b in score[~label]] for a in score[label]])


# ---- resamples ----


def test_each_group_is_drawn_from_as_often_as_it_has_images():
    groups = np.array(["b", "a", "c", "a", "b", "b", "a", "b"])
    found = resamples(groups, 400, 0)
    assert found.shape == (400, 8)
    assert found.dtype == np.int16
    for group in "abc":
        assert (found[:, groups == group].sum(axis=1) == (groups == group).sum()).all()
    assert (found[:, 2] == 1).all()
    # a member of n is drawn Binomial(n, 1/n) times: mean 1, variance 1 - 1/n
    np.testing.assert_allclose(found.mean(axis=0), 1, atol=5 / 20)
    assert found[:, groups == "b"].var() == pytest.approx(3 / 4, abs=0.12)


def test_resamples_are_those_of_their_seed():
    groups = np.repeat([0, 1], 20)
    np.testing.assert_array_equal(resamples(groups, 5, 3), resamples(groups, 5, 3))
    assert (resamples(groups, 5, 3) != resamples(groups, 5, 4)).any()


# ---- AUROCs of weighted images ----


@pytest.mark.parametrize("levels", [None, 2])
def test_weighted_aurocs_are_scikit_learns(levels, monkeypatch):
    score, _, label = images(0, levels=levels)
    weights = np.random.default_rng(1).integers(0, 4, (7, len(score)))
    expected = [roc_auc_score(label, score, sample_weight=w) for w in weights]
    np.testing.assert_allclose(aurocs(score, label, weights), expected, rtol=1e-12)
    np.testing.assert_allclose(aurocs(score, label.astype(int), weights * 0.3), expected, rtol=1e-12)


def test_aurocs_do_not_depend_on_the_chunks():
    score, _, label = images(1, 2000, 1000, levels=9)
    weights = resamples(label, 3000, 0)  # more than two chunks
    found = aurocs(score, label, weights)
    np.testing.assert_array_equal(found[[0, 1397, 1398, 2999]], aurocs(score, label, weights[[0, 1397, 1398, 2999]]))
    row = np.repeat(np.arange(3000), weights[2999])
    assert found[2999] == pytest.approx(roc_auc_score(label[row], score[row]), rel=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_weights_of_one_give_the_auroc_of_the_package(levels):
    score, _, label = images(2, levels=levels)
    expected = auroc(torch.tensor(score), torch.tensor(label))
    assert aurocs(score, label, np.ones((1, len(score))))[0] == pytest.approx(expected, rel=1e-14)
    assert interval(score, label).value == pytest.approx(expected, rel=1e-14)


def test_a_kind_that_weighs_nothing_has_no_auroc():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = aurocs(np.array([1.0, 2, 3]), np.array([0, 0, 1]), np.array([[1, 1, 0], [1, 0, 1]]))
    np.testing.assert_array_equal(found, [np.nan, 1])


# ---- DeLong ----


def plain_delong(one, other, label):
    """Difference and its variance from the structural components, as DeLong et al. write them."""
    a, b = wins(one, label), wins(other, label)
    m, n = a.shape
    by_anomalous, by_normal = np.stack([a.mean(1), b.mean(1)]), np.stack([a.mean(0), b.mean(0)])
    covariance = np.cov(by_anomalous) / m + np.cov(by_normal) / n
    return a.mean() - b.mean(), covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("sizes", [(60, 40), (7, 31), (2, 2)])
def test_delong_is_the_plain_loop(levels, sizes):
    one, other, label = images(3, *sizes, apart=0.5, levels=levels)
    value, variance = plain_delong(one, other, label)
    found = delong(one, other, label)
    assert found.difference == pytest.approx(value, rel=1e-12)
    assert found.error == pytest.approx(variance**0.5, rel=1e-9)
    assert found.z == pytest.approx(value / variance**0.5, rel=1e-9)
    assert found.p == pytest.approx(2 * stats.norm.cdf(-abs(found.z)), rel=1e-12)
    assert delong(other, one, label).z == -found.z


def test_delong_of_a_method_with_itself_finds_nothing():
    one, _, label = images(4)
    assert delong(one, one, label) == (0, 0, 0, 1)
    assert delong(one, np.exp(one), label).p == 1


def test_delong_cannot_judge_a_difference_without_variance():
    label = np.repeat([False, True], 3)
    found = delong(np.arange(6.0), np.zeros(6), label)
    assert found.difference == 0.5
    assert np.isnan(found.z)
    assert np.isnan(found.p)


def test_delong_rejects_as_often_as_it_says():
    """400 draws at .05: by the binomial distribution 5 to 39 rejections with a probability of .9999."""
    rejected = sum(delong(*images(seed, 50, 50)).p <= 0.05 for seed in range(400))
    assert stats.binom.ppf([5e-5, 1 - 5e-5], 400, 0.05).tolist() == [5, 39]
    assert 5 <= rejected <= 39


# ---- intervals ----


def test_interval_of_one_auroc_is_delongs_on_the_logit_scale():
    score, _, label = images(5)
    won = wins(score, label)
    error = np.sqrt(won.mean(1).var(ddof=1) / len(won) + won.mean(0).var(ddof=1) / won.shape[1])
    found = interval(score, label, level=0.9)
    assert found.error == pytest.approx(error, rel=1e-9)
    for end, sign in ((found.low, -1), (found.high, 1)):
        odds = np.log(end / (1 - end)) - np.log(found.value / (1 - found.value))
        assert odds == pytest.approx(sign * 1.6448536 * error / (found.value * (1 - found.value)), rel=1e-6)


def test_errors_are_those_of_the_bootstrap():
    """Of one AUROC, of a mean and of a difference of means; 2,000 resamples have an error of 1.6 %."""
    one, other, labels, own = classes(6)
    weights = resamples(own, 2000, 0)
    drawn = [np.mean([aurocs(s, y, weights) for s, y in zip(x, labels, strict=True)], axis=0) for x in (one, other)]
    assert interval(one, labels).error == pytest.approx(drawn[0].std(), rel=0.08)
    assert difference(one, other, labels).error == pytest.approx((drawn[0] - drawn[1]).std(), rel=0.08)
    single = aurocs(one[0], labels[0], weights).std()
    assert interval(one[0], labels[0], own).error == pytest.approx(single, rel=0.08)


def test_groups_are_the_own_classes_unless_given():
    one, other, labels, own = classes(7)
    assert interval(one, labels) == interval(one, labels, own) == interval(one, labels, np.array(list("dbca"))[own])
    assert difference(one, other, labels) == difference(one, other, labels, own)
    assert interval(one[0], labels[0]) == interval(one[0], labels[0], labels[0]) == interval(one[0], 1 * labels[0])
    assert interval(one[0], labels[0]) != interval(one[0], labels[0], own)
    np.testing.assert_allclose(interval(one, labels).value, np.mean([
        roc_auc_score(y, s) for s, y in zip(one, labels, strict=True)]))  # fmt: skip


def test_a_seed_that_repeats_another_adds_no_certainty():
    score, other, label = images(8)
    assert interval(np.stack([score, score]), label)[1:4] == pytest.approx(interval(score, label)[1:4], rel=1e-12)
    assert interval(np.stack([score, other]), label).error < max(interval(s, label).error for s in (score, other))


def test_difference_of_a_method_with_itself_is_nothing():
    score, _, label = images(9)
    assert difference(score, score, label)[:4] == (0, 0, 0, 0)
    assert difference(score, 3 * score, label)[:4] == (0, 0, 0, 0)
    perfect = label + 0.1 * score.argsort().argsort() / len(score)
    assert difference(perfect, perfect, label)[:4] == (0, 0, 0, 0)


def test_pairing_narrows_the_interval_of_correlated_scores():
    one, other, label = images(10)
    paired = difference(one, other, label)
    apart = np.hypot(interval(one, label).error, interval(other, label).error)
    assert paired.error < 0.6 * apart
    assert paired.high - paired.low == pytest.approx(2 * 1.959964 * paired.error, rel=1e-6)
    assert (paired.low > 0 or paired.high < 0) == (delong(one, other, label).p < 0.05)
    mirrored = difference(other, one, label)
    assert (mirrored.low, mirrored.high) == (-paired.high, -paired.low)


def test_a_difference_stays_between_minus_one_and_one():
    label = np.repeat([False, True], 3)
    found = difference(np.array([0.0, 1, 2, 1.5, 3, 4]), np.array([4.0, 3, 1, 2, 0, 0]), label)
    assert found.high == 1
    assert difference(np.array([4.0, 3, 1, 2, 0, 0]), np.array([0.0, 1, 2, 1.5, 3, 4]), label).low == -1


@pytest.mark.parametrize("normal", [5, 300])
def test_a_perfect_estimate_is_not_sure(normal):
    label = np.arange(normal + 20) >= normal
    score = label + np.random.default_rng(0).uniform(size=len(label)) / 2
    found = interval(score, label)
    end = 0.025 ** (1 / min(normal, 20))  # of so many pairs without a common image
    assert found == (1, 0, pytest.approx(end), 1, False)
    assert interval(-score, label) == (0, 0, 0, pytest.approx(1 - end), False)
    assert interval(np.stack([score] * 3), label) == found
    assert difference(score, -score, label).value == 1
    other = label + np.random.default_rng(1).uniform(size=len(label)) / 2
    assert difference(score, other, label) == (0, 0, pytest.approx(end - 1), pytest.approx(1 - end), False)


def test_the_end_of_a_perfect_estimate_holds_for_the_worst_distribution():
    """A share of anomalies looks more normal than all normal images: 1 is estimated where none of these is drawn."""
    end = interval(np.arange(25.0), np.arange(25) >= 5).low  # five normal images are the rarer kind
    assert end**5 == pytest.approx(0.025)


def test_almost_perfect_estimates_have_ends_below_one():
    label = np.arange(2000) >= 1000
    score = np.arange(2000.0)
    score[[999, 1000]] = score[[1000, 999]]
    found = interval(score, label)
    assert 0.9999 < found.low < found.value < found.high < 1
    assert not found.reliable
    one, other = np.arange(4.0), np.array([0.0, 2, 1, 3])
    assert difference(one, other, one > 1).value == 0.25


def test_five_images_ranked_wrong_are_reliable():
    assert reliable(0.75, 20)
    assert not reliable(0.76, 20)
    assert reliable(0.995, 1000)
    assert not reliable(0.996, 1000)
    assert not reliable(0.004, 1000)
    assert not reliable(1.0, 10**9)
    one, other, label = images(11, 300, 30, apart=0.3)
    assert interval(one, label).reliable == (interval(one, label).value <= 1 - 5 / 30) is True
    assert difference(one, other, label).reliable
    good = one + 9 * label
    assert not difference(one, good, label).reliable
    assert not difference(good, one, label).reliable
    assert not difference(one, one, label).reliable


def test_images_count_once_for_the_reliability_of_a_mean():
    """25 of each of four classes are rare in some row: 100, where the seeds of one class share their 25."""
    one, _, labels, _ = classes(12)
    found = interval(one, labels)
    assert 5 / 100 < 1 - found.value < 5 / 25
    assert found.reliable
    seeds = interval(np.stack([one[0]] * 4), labels[:1])
    assert 5 / 100 < 1 - seeds.value < 5 / 25
    assert not seeds.reliable
    assert interval(one, ~labels).reliable  # normal and anomalous exchanged


@pytest.mark.parametrize(("normal", "anomalous"), [(200, 100), (40, 60)])
def test_intervals_hold_the_truth_as_often_as_they_say(normal, anomalous):
    """Bi-normal scores of AUROC .8: exact intervals of 90 % hold it 335 to 381 times, with a probability of .9999."""
    truth, held = 0.8, 0
    rng = np.random.default_rng(0)
    label = np.arange(normal + anomalous) >= normal
    for _ in range(400):
        found = interval(rng.normal(size=len(label)) + label * np.sqrt(2) * stats.norm.ppf(truth), label, level=0.9)
        held += found.low <= truth <= found.high
    assert stats.binom.ppf([5e-5, 1 - 5e-5], 400, 0.9).tolist() == [335, 381]
    assert 335 <= held <= 381


# ---- many methods, many problems ----


def test_holm_is_the_plain_loop():
    p = np.random.default_rng(0).uniform(0, 0.2, 9)
    p[3] = p[5]
    for alpha in np.unique(np.concatenate([p, holm(p) - 1e-9, holm(p) + 1e-9])):
        rejected = set()
        for step, i in enumerate(np.argsort(p)):
            if p[i] * (9 - step) > alpha:
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(holm(p) <= alpha)) == rejected
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])  # R: p.adjust
    np.testing.assert_allclose(holm(np.array([0.02, np.nan, 0.6, 0.9])), [0.06, np.nan, 1, 1])
    assert not len(holm(np.array([])))


def test_friedman_is_demsars_example():
    found = friedman(DEMSAR)
    np.testing.assert_allclose(found.ranks, [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    ties = sum((row == v).sum() ** 3 - (row == v).sum() for row in DEMSAR for v in np.unique(row))
    uncorrected = found.chi_square * (1 - ties / (14 * 4 * (4**2 - 1)))
    assert uncorrected == pytest.approx(9.28, abs=0.005)
    assert 13 * uncorrected / (14 * 3 - uncorrected) == pytest.approx(3.69, abs=0.005)
    assert found.f == pytest.approx(13 * found.chi_square / (42 - found.chi_square), rel=1e-12)
    assert found.p == pytest.approx(stats.f.sf(found.f, 3, 39), rel=1e-12)
    assert found.chi_square == pytest.approx(stats.friedmanchisquare(*DEMSAR.T).statistic, rel=1e-12)
    assert nemenyi_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_friedman_of_equal_and_of_always_ordered_methods():
    assert friedman(np.full((5, 3), 0.9))[1:] == (0, 0, 1)
    found = friedman(np.arange(15.0).reshape(5, 3))
    assert found.ranks.tolist() == [3, 2, 1]
    assert found[1:3] == (pytest.approx(10), np.inf)
    assert found.p == pytest.approx(1 / 6**4, abs=6e-4)  # of all orders within five problems, six agree
    assert friedman(np.array([[0.9, 0.8, 0.7]] * 2)).p == pytest.approx(1 / 6, abs=0.015)
    assert friedman(np.array([[0.9, 0.8, 0.7]] * 10)).p == 0  # F's own
    noisy = np.full((5, 3), 0.3)
    noisy[:, 1] = 0.1 + 0.2  # equal but for rounding
    assert friedman(noisy).ranks.tolist() == [2, 2, 2]


def test_critical_differences_are_demsars():
    """His table 5: q of .05 for 2 to 10 methods, and of .1."""
    for methods, q in zip(range(2, 11), (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), strict=True):
        assert nemenyi_difference(methods, 20) == pytest.approx(q * (methods * (methods + 1) / 120) ** 0.5, rel=3e-4)
    assert nemenyi_difference(5, 30, level=0.9) == pytest.approx(2.459 * (30 / 180) ** 0.5, rel=3e-4)


def test_wilcoxon_is_scipys_and_holms():
    table = np.random.default_rng(0).normal([0.9, 0.9, 0.95, 0.8], 0.05, (12, 4))
    pairs = list(combinations(range(4), 2))
    expected = holm(np.array([stats.wilcoxon(table[:, i], table[:, j]).pvalue for i, j in pairs]))
    found = wilcoxon_holm(table)
    np.testing.assert_allclose([found[i, j] for i, j in pairs], expected, rtol=1e-12)
    np.testing.assert_array_equal(found, found.T)
    assert (np.diag(found) == 1).all()
    signs = np.array([np.sign(k) for k in product([-1, 1], repeat=12)]) @ np.arange(1, 13)  # all 2^12 orders of signs
    gap = table[:, 2] - table[:, 3]
    statistic = (np.sign(gap) * stats.rankdata(abs(gap))).sum()
    assert stats.wilcoxon(gap).pvalue == pytest.approx((abs(signs) >= abs(statistic)).mean())


def test_wilcoxon_splits_zeros_and_takes_equal_methods():
    found = wilcoxon_holm(DEMSAR[:, :2])
    ranks = stats.rankdata(abs(np.round(DEMSAR[:, 0] - DEMSAR[:, 1], 12)))
    assert ranks[DEMSAR[:, 0] == DEMSAR[:, 1]].tolist() == [1.5, 1.5]
    assert found[0, 1] == pytest.approx(2 * stats.norm.cdf(-2.54), rel=0.02)  # his z, R+ = 93 and R- = 12
    assert (wilcoxon_holm(np.full((6, 3), 0.7)) == 1).all()


# ---- other metrics ----


@pytest.mark.parametrize("levels", [None, 1, 3])
def test_average_precision_is_scikit_learns(levels):
    for seed in range(5):
        score, _, label = images(seed, 80, 30, levels=levels)
        assert average_precision(score, label) == pytest.approx(average_precision_score(label, score), rel=1e-12)
    assert average_precision(np.zeros(10), np.arange(10) < 3) == pytest.approx(0.3)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("tpr", [0.05, 0.5, 0.9, 0.95, 1.0])
def test_false_alarms_are_the_first_that_scikit_learns_curve_needs(levels, tpr):
    for seed in range(5):
        score, _, label = images(seed, 80, 20, levels=levels)
        false, true, _ = roc_curve(label, score, drop_intermediate=False)
        assert fpr_at_tpr(score, label, tpr) == pytest.approx(false[np.argmax(true >= tpr - 1e-9)], rel=1e-12)


def test_normal_images_that_tie_with_the_threshold_are_false_alarms():
    score, label = np.array([0.0, 1, 1, 1, 2, 3]), np.array([0, 0, 0, 1, 0, 1])
    assert fpr_at_tpr(score, label) == 0.75
    assert fpr_at_tpr(score, label, 0.5) == 0
    assert fpr_at_tpr(score, label, 0.51) == 0.75


# ---- what is refused ----

ONE = np.arange(4.0)
BOTH = np.array([0, 0, 1, 1])


@pytest.mark.parametrize("label", [np.zeros(4), np.ones(4)])
@pytest.mark.parametrize(
    "function",
    [interval, average_precision, fpr_at_tpr, lambda s, y: aurocs(s, y, np.ones((1, 4))), lambda s, y: delong(s, s, y)],
)
def test_one_kind_of_image_is_refused(function, label):
    with pytest.raises(PandaError, match=r"There are [04] normal and [04] anomalous images"):
        function(ONE, label)
    with pytest.raises(PandaError, match="1 of 4 anomaly scores are NaN or infinite"):
        function(np.array([0, np.nan, 2, 3]), BOTH)


def test_one_image_of_a_group_leaves_everything_possible():
    one = np.array([0, 0, 1, 0])  # whose AUROC is 2/3
    for found in (interval(ONE, one), interval(ONE, np.array([0, 1, 0, 1]), groups=np.array([0, 1, 2, 2]))):
        assert (found.error, found.low, found.high, found.reliable) == (np.inf, 0, 1, False)
    gap = difference(ONE, -ONE, one)
    assert (gap.value, gap.low, gap.high, gap.reliable) == (pytest.approx(1 / 3), -1, 1, False)
    assert delong(ONE, -ONE, one).p == 1
    assert joined([(interval(ONE, BOTH), 1), (interval(ONE, one), 1)])[1:] == (np.inf, 0, 1, False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval(ONE, BOTH[:3]), r"Scores \(1, 4\) and labels \(1, 3\)"),
        (lambda: interval(np.stack([ONE] * 3), np.stack([BOTH] * 2)), r"Scores \(3, 4\) and labels \(2, 4\)"),
        (lambda: interval(ONE, BOTH, groups=np.zeros(3)), r"There are groups \(3,\) for 4 images"),
        (lambda: interval(ONE, BOTH, level=1.0), "level=1 is not a confidence level"),
        (lambda: interval(ONE, BOTH, level=0), "level=0 is not a confidence level"),
        (lambda: difference(ONE, ONE, BOTH, level=95), "level=95 is not a confidence level"),
        (lambda: difference(ONE, ONE[:3], BOTH), r"Scores \(1, 3\) and labels \(1, 4\)"),
        (lambda: average_precision(ONE, BOTH[:3]), r"Scores \(4,\) and labels \(3,\)"),
        (lambda: average_precision(ONE[None], BOTH[None]), r"Scores \(1, 4\) and labels \(1, 4\)"),
        (lambda: fpr_at_tpr(ONE, BOTH, 0), "tpr=0 is not a share"),
        (lambda: fpr_at_tpr(ONE, BOTH, 95), "tpr=95 is not a share"),
        (lambda: nemenyi_difference(3, 5, 1.5), "level=1.5 is not a confidence level"),
        (lambda: nemenyi_difference(1, 5), "1 methods on 5 problems"),
        (lambda: nemenyi_difference(2, 0), "2 methods on 0 problems"),
        (lambda: friedman(np.ones((1, 3))), r"A table of shape \(1, 3\)"),
        (lambda: wilcoxon_holm(np.ones((3, 1))), r"A table of shape \(3, 1\)"),
        (lambda: friedman(np.ones(4)), r"A table of shape \(4,\)"),
        (lambda: friedman(np.array([[0.5, np.nan], [0.5, 0.5]])), r"A table of shape \(2, 2\)"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, message):
    with pytest.raises(PandaError, match=message):
        call()


def test_estimates_on_separate_images_are_joined_as_independent():
    one, other = Estimate(0.9, 0.02, 0.85, 0.93, True), Estimate(0.7, 0.03, 0.64, 0.76, False)
    assert joined([(one, 3)]) is one
    found = joined([(one, 1), (other, 3)])
    assert found.value == pytest.approx((0.9 + 3 * 0.7) / 4)
    assert found.error == pytest.approx(np.hypot(0.02, 3 * 0.03) / 4)
    assert not found.reliable
    middle, half = np.log(found.value / (1 - found.value)), 1.959964 * found.error / (found.value * (1 - found.value))
    np.testing.assert_allclose(
        [found.low, found.high], 1 / (1 + np.exp(-np.array([middle - half, middle + half]))), rtol=1e-6
    )
    gap = joined([(Estimate(-0.99, 0.02, -1, -0.95, True), 1)] * 2, bounded=False)
    assert (gap.low, gap.high) == (-1.0, pytest.approx(-0.99 + 1.959964 * 0.02 / np.sqrt(2)))
    best = joined([(Estimate(1.0, 0.0, 0.8, 1.0, False), 1), (Estimate(1.0, 0.0, 0.7, 1.0, False), 1)])
    assert best[:4] == (1.0, 0.0, 0.7, 1.0)
    with pytest.raises(PandaError, match="no estimate"):
        joined([])


def test_separate_images_have_the_mean_of_one_set_of_them():
    """Two categories of their own, against all images taken as one set with missing scores left out."""
    rng = np.random.default_rng(0)
    parts = []
    for size in (60, 90):
        label = np.arange(size) % 3 > 0
        parts.append((interval(rng.normal(size=size) + label, label), 1))
    drawn = [np.mean([rng.normal(part.value, part.error) for part, _ in parts]) for _ in range(20000)]
    assert np.std(drawn) == pytest.approx(joined(parts).error, rel=0.03)
