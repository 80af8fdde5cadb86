"""How sure AUROCs are: their intervals, those of means and differences, and tests of methods over many problems.

Scores (N,) are higher for more anomalous images, labels (N,) are 1 or True for anomalous ones, and all rows of a table
score the same images. Intervals come from the placements of images, not from resamples: experiments/coverage.py has
compared both. Resamples are for what has no formula, such as the rank of a method.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import expit, logit

from panda_lightning.types import PandaError

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Values = npt.NDArray[Any]
LEAST = 5  # of misranked images; see reliable
FEW = 6  # problems; see friedman


class Estimate(NamedTuple):
    """An AUROC, a mean of AUROCs or a difference, with its standard error and interval, all as fractions."""

    value: float
    error: float
    low: float
    high: float
    reliable: bool


class DeLong(NamedTuple):
    """A difference of two AUROCs on the same images, its standard error, z, and two-sided p."""

    difference: float
    error: float
    z: float
    p: float


class Friedman(NamedTuple):
    """Average ranks (methods,), 1 is best, Friedman's chi-square, Iman and Davenport's F, and the p of this F."""

    ranks: Array
    chi_square: float
    f: float
    p: float


def resamples(groups: Values, count: int, seed: int) -> npt.NDArray[np.int16]:
    """How often each image is in each of ``count`` bootstrap samples, (count, N).

    Within each group as many images are drawn as it has, with replacement. Groups (N,) are any values, such as the
    images' own classes: then one sample serves all classes and methods, as they share the images.
    """
    rng = np.random.default_rng(seed)
    found = np.empty((count, len(groups)), dtype=np.int16)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        found[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), count)
    return found


def aurocs(score: Array, label: Values, weights: Values) -> Array:
    """AUROC (R,) under each row of the images' weights (R, N), ties counted half; NaN where one kind weighs nothing.

    Weights of one give metrics.auroc. Memory beyond the weights is about 200 MiB or less.

    Raises:
        PandaError: If a score is not finite, or there are no normal or no anomalous images.
    """
    anomalous, normal = _sides(score, label)
    normal = normal[np.argsort(score[normal])]
    anomalous = anomalous[np.argsort(score[anomalous])]  # neighbours in memory are read one after the other
    first, last = (np.searchsorted(score[normal], score[anomalous], side) for side in ("left", "right"))
    found = np.empty(len(weights))
    rows = max(1, (1 << 22) // len(score))
    for start in range(0, len(weights), rows):
        part = np.asarray(weights[start : start + rows], dtype=np.float64)
        below = np.zeros((len(part), len(normal) + 1))
        np.cumsum(part[:, normal], axis=1, out=below[:, 1:])
        weight = part[:, anomalous]
        won = np.einsum("ra,ra->r", weight, below[:, first] + below[:, last]) / 2
        with np.errstate(invalid="ignore"):
            found[start : start + rows] = won / (weight.sum(axis=1) * below[:, -1])
    return found


def interval(scores: Array, labels: Values, groups: Values | None = None, level: float = 0.95) -> Estimate:
    r"""An AUROC, or the mean of several on the same images, with an interval.

    .. math:: \operatorname{logit} A \pm z \frac{s}{A (1 - A)}

    The standard error s is DeLong's (1988). For a mean, the images' shares in the error are added over the rows first,
    so rows may depend on each other as they like, and the variance is taken within groups. An estimate of 1 has the
    lower end :math:`((1 - level) / 2)^{1 / k}` for k images of the rarer kind, which holds for every distribution: k
    pairs without a common image are ranked right with probability :math:`A^k` at most (0 likewise). A group of one
    image has no variance that could be known: the error is infinite, and the interval ends where AUROC does.

    Args:
        scores: (N,), or (K, N) for the mean over K classes, seeds or both.
        labels: (N,), or (K, N) if rows have labels of their own.
        groups: (N,), the kinds that images were drawn from, such as their own classes. By default images with the same
            labels in all rows are a group: DeLong's variance for one row, own classes for one class against the rest.
        level: Of confidence, between 0 and 1.

    Raises:
        PandaError: If scores are not finite, shapes differ, or a row has one kind of image only.
    """
    scores, labels, groups = _table(scores, labels, groups)
    value, share = _mean(scores, labels)
    error, (fewest, rare), z = _error(share, groups), _rare(labels), _quantile(level)
    if value in (0, 1):
        end = _end(fewest, level)
        low, high = (end, 1.0) if value else (0.0, 1 - end)
    else:
        middle, half = logit(value), z * error / (value * (1 - value))
        low, high = float(expit(middle - half)), float(expit(middle + half))
    return Estimate(value, error, low, high, 0 < error < math.inf and reliable(value, rare))


def joined(parts: Sequence[tuple[Estimate, int]], bounded: bool = True, level: float = 0.95) -> Estimate:
    """The mean of estimates on separate images, such as MVTec's categories, each counted so many times.

    Their errors are independent. The interval is that of ``interval``, on the scale of logits, or plain for differences
    (``bounded`` False); it is reliable where all parts are. One part is returned as it is.

    Raises:
        PandaError: If there is none.
    """
    if not parts:
        raise PandaError("There is no estimate to take the mean of: give one or more.")
    if len(parts) == 1:
        return parts[0][0]
    count = sum(times for _, times in parts)
    value = sum(part.value * times for part, times in parts) / count
    error = math.sqrt(sum((part.error * times) ** 2 for part, times in parts)) / count
    half, sure = _quantile(level) * error, all(part.reliable for part, _ in parts)
    if not bounded:
        return Estimate(value, error, max(-1.0, value - half), min(1.0, value + half), sure)
    if value in (0, 1):
        low, high = min(part.low for part, _ in parts), max(part.high for part, _ in parts)
        return Estimate(value, error, low, high, False)
    middle, half = logit(value), half / (value * (1 - value))
    return Estimate(value, error, float(expit(middle - half)), float(expit(middle + half)), sure)


def difference(one: Array, other: Array, labels: Values, groups: Values | None = None, level: float = 0.95) -> Estimate:
    """How much larger the (mean) AUROC of one method is than the other's on the same images, in [-1, 1].

    Scores, labels, groups and errors are as in ``interval``. The interval is the difference plus or minus z standard
    errors, which are DeLong's (1988) for paired scores. Two methods that both rank all pairs right differ by no more
    than the lower end of ``interval`` allows. It is reliable if the AUROCs of both methods are.
    """
    one, labels, groups = _table(one, labels, groups)
    other = _table(other, labels, groups)[0]
    (first, mine), (second, theirs) = _mean(one, labels), _mean(other, labels)
    error, (fewest, rare) = _error(mine - theirs, groups), _rare(labels)
    half = _quantile(level) * error
    if first == second and first in (0, 1) and not np.array_equal(one, other):
        half = 1 - _end(fewest, level)
    value = first - second
    sure = 0 < error < math.inf and reliable(first, rare) and reliable(second, rare)
    return Estimate(value, error, max(-1.0, value - half), min(1.0, value + half), sure)


def reliable(value: float, rare: int) -> bool:
    """Whether an interval about this AUROC holds its level, for so many images of the rarer kind (normal or anomalous).

    The rule is (1 - AUROC) * images >= 5: about five images' worth are ranked wrong. For a mean, those images count
    that are of the rarer kind in any row. In experiments/coverage.py 95 % intervals hold the truth in 93 to 96 % of
    draws where the true AUROC satisfies the rule, for light and heavy tails. Where the product is 1 this is 83 to 95 %,
    and at .1 it falls to 77 %: the anomaly that looks normal is then mostly not in the sample, and nothing in the
    sample tells. An estimate may also satisfy the rule by chance, with a truth that does not. An AUROC below .5 is
    judged as its mirror image.
    """
    return min(value, 1 - value) * rare >= LEAST - 1e-9


def delong(one: Array, other: Array, label: Values) -> DeLong:
    """Paired test of two AUROCs (DeLong 1988), from midranks in O(N log N) (Sun, Xu 2014).

    Without variance p is 1 for equal AUROCs, and NaN for others, which no variance can judge; where a kind has one
    image, the error is infinite, and p is 1.

    Raises:
        PandaError: If scores are not finite, shapes differ, or there is one kind of image only.
    """
    found = difference(one, other, label)
    unjudged = math.nan if found.value else 0.0
    z = found.value / found.error if found.error else unjudged
    return DeLong(found.value, found.error, z, float(2 * stats.norm.sf(abs(z))))


def holm(p: Array) -> Array:
    """p-values (M,) adjusted for each other so that any false one is rare (Holm 1979), in the same order.

    Those at most alpha are rejected with a probability of any error of alpha at most. NaN was not tested and stays.
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")[: int(np.isfinite(p).sum())]  # NaN last
    found = np.full(len(p), np.nan)
    found[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return found


def friedman(table: Array) -> Friedman:
    """Whether methods differ over many problems: of AUROCs (problems, methods), higher is better.

    Equal AUROCs share their mean rank, and chi-square is corrected for them as in scipy; Demsar (JMLR 2006) does not.
    F has (methods - 1) and (methods - 1)(problems - 1) degrees of freedom (Iman, Davenport 1980). For less than
    ``FEW`` problems, where F is far from that distribution, p is the share of 9,999 random orders of the ranks within
    each problem (and of the one that was found) whose chi-square is as large. Equal rows have p 1.

    Raises:
        PandaError: If there are less than two problems or methods, or an AUROC is missing.
    """
    table = _problems(table)
    problems, methods = table.shape
    ranks = stats.rankdata(-np.round(table, 12), axis=1)
    spread = float(np.square(ranks - (methods + 1) / 2).sum())
    between = problems * np.square(ranks.mean(axis=0) - (methods + 1) / 2).sum()
    chi_square = float(problems * (methods - 1) * between / spread) if spread else 0.0
    rest = problems * (methods - 1) - chi_square
    f = (problems - 1) * chi_square / rest if rest > 1e-9 else math.inf
    if problems >= FEW:
        p = float(stats.f.sf(f, methods - 1, (methods - 1) * (problems - 1)))
    else:
        orders = np.random.default_rng(0).permuted(np.broadcast_to(ranks, (9999, *ranks.shape)), axis=2)
        p = float((1 + (_unequal(orders) >= _unequal(ranks) - 1e-9).sum()) / 10000)
    return Friedman(ranks.mean(axis=0), chi_square, f, p)


def _unequal(ranks: Array) -> Array:
    """How unequal the sums of ranks (..., problems, methods) are; chi-square grows with it."""
    found: Array = np.square(ranks.sum(axis=-2)).sum(axis=-1)
    return found


def nemenyi_difference(methods: int, problems: int, level: float = 0.95) -> float:
    """By how much average ranks of two of the methods must differ, at this confidence (Nemenyi 1963; Demsar 2006)."""
    _quantile(level)
    if methods < 2 or problems < 1:
        raise PandaError(
            f"{methods} methods on {problems} problems have no critical difference: give 2 or more methods and 1 or "
            "more problems."
        )
    quantile = float(stats.studentized_range.ppf(level, methods, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(methods * (methods + 1) / (6 * problems))


def wilcoxon_holm(table: Array) -> Array:
    """Two-sided p (methods, methods) of Wilcoxon's signed ranks for each pair, adjusted by Holm; 1 on the diagonal.

    The table is that of ``friedman``, and so are the errors. Half of the zero differences count for either method
    (Demsar 2006).
    """
    table = _problems(table)
    found = np.ones((table.shape[1],) * 2)
    pairs = list(combinations(range(table.shape[1]), 2))
    gaps = [np.round(table[:, i] - table[:, j], 12) for i, j in pairs]  # equal but for rounding is equal
    raw = [stats.wilcoxon(gap, zero_method="zsplit").pvalue if gap.any() else 1.0 for gap in gaps]
    for (i, j), p in zip(pairs, holm(np.array(raw)), strict=True):
        found[i, j] = found[j, i] = p
    return found


def average_precision(score: Array, label: Values) -> float:
    """Sum of precision times gain in recall over all thresholds, anomalies positive; equal scores are one threshold.

    Raises:
        PandaError: If a score is not finite, or there are no normal or no anomalous images.
    """
    anomalous, _ = _sides(score, label)
    values, step = np.unique(-score, return_inverse=True)
    hits = np.bincount(step[anomalous], minlength=len(values))
    return float((hits * np.cumsum(hits) / np.cumsum(np.bincount(step))).sum() / len(anomalous))


def fpr_at_tpr(score: Array, label: Values, tpr: float = 0.95) -> float:
    """Share of normal images at or above the highest score at or above which a share ``tpr`` of anomalies lies.

    Normal images that tie with this score are false alarms; nothing is interpolated.

    Raises:
        PandaError: If a score is not finite, there are no normal or no anomalous images, or tpr is not in (0, 1].
    """
    if not 0 < tpr <= 1:
        raise PandaError(f"tpr={tpr:g} is not a share of anomalies to find: give a number above 0 and at most 1.")
    anomalous, normal = _sides(score, label)
    needed = math.ceil(tpr * len(anomalous) - 1e-9)
    return float((score[normal] >= np.sort(score[anomalous])[-needed]).mean())


def _sides(score: Array, label: Values) -> tuple[Indices, Indices]:
    """Where the anomalous and the normal images are."""
    if score.ndim != 1 or score.shape != label.shape:
        raise PandaError(f"Scores {score.shape} and labels {label.shape} do not fit: give one of each for every image.")
    bad = int((~np.isfinite(score)).sum())
    if bad:
        raise PandaError(f"{bad} of {len(score)} anomaly scores are NaN or infinite: leave this run out, or repeat it.")
    anomalous, normal = np.flatnonzero(label), np.flatnonzero(np.logical_not(label))
    if not len(anomalous) or not len(normal):
        raise PandaError(
            f"There are {len(normal)} normal and {len(anomalous)} anomalous images, and AUROC needs both: test on both."
        )
    return anomalous, normal


def _table(scores: Array, labels: Values, groups: Values | None) -> tuple[Array, Any, Any]:
    """Scores and labels as (K, N), and groups as numbers (N,)."""
    scores, labels = np.atleast_2d(scores), np.atleast_2d(np.asarray(labels, dtype=np.bool_))
    if labels.shape not in (scores.shape, (1, scores.shape[1])):
        raise PandaError(f"Scores {scores.shape} and labels {labels.shape} do not fit: give the same rows and images.")
    if groups is None:
        return scores, labels, np.unique(labels, axis=1, return_inverse=True)[1].ravel()
    if np.shape(groups) != scores.shape[1:]:
        raise PandaError(f"There are groups {np.shape(groups)} for {scores.shape[1]} images: give one for each image.")
    return scores, labels, np.unique(groups, return_inverse=True)[1].ravel()


def _mean(scores: Array, labels: Values) -> tuple[float, Array]:
    """Mean of the AUROCs of all rows (K, N), and the share (N,) of each image in its error."""
    value, share = 0.0, np.zeros(scores.shape[1])
    for score, label in zip(scores, np.broadcast_to(labels, scores.shape), strict=True):
        anomalous, normal = _sides(score, label)
        rank, place = stats.rankdata(score), np.empty(len(score))
        place[anomalous] = (rank[anomalous] - stats.rankdata(score[anomalous])) / len(normal)  # share of normal below
        place[normal] = 1 - (rank[normal] - stats.rankdata(score[normal])) / len(anomalous)
        auroc = place[anomalous].mean()
        value += float(auroc)
        share += (place - auroc) / np.where(label, len(anomalous), len(normal))
    return value / len(scores), share / len(scores)


def _error(share: Array, groups: Indices) -> float:
    """Standard error of the sum of shares (N,) of images that were drawn within their groups."""
    size = np.bincount(groups)
    if np.any(size < 2):
        return math.inf
    centred = share - (np.bincount(groups, share) / size)[groups]
    return math.sqrt(float((np.square(centred) * (size / (size - 1))[groups]).sum()))


def _rare(labels: Values) -> tuple[int, int]:
    """Images of the rarer kind: in the row where they are fewest, and in any row."""
    rare = np.where(2 * labels.sum(axis=1, keepdims=True) <= labels.shape[1], labels, ~labels)
    return int(rare.sum(axis=1).min()), int(rare.any(axis=0).sum())


def _end(fewest: int, level: float) -> float:
    """Lower end for an AUROC of 1; see interval."""
    return float(((1 - level) / 2) ** (1 / fewest))


def _quantile(level: float) -> float:
    """Of the normal distribution, for a two-sided interval."""
    if not 0 < level < 1:
        raise PandaError(f"level={level:g} is not a confidence level: give a number between 0 and 1, such as 0.95.")
    return float(stats.norm.ppf((1 + level) / 2))


def _problems(table: Array) -> Array:
    """The table, if there is something to compare."""
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        given = f"A table of shape {table.shape} with {int((~np.isfinite(table)).sum())} missing AUROCs"
        raise PandaError(f"{given} cannot be compared: give all AUROCs of 2 or more problems (rows) and methods.")
    return table
