"""How often do intervals of AUROCs hold the truth? python experiments/coverage.py WHAT [DRAWS] [RESAMPLES].

Prints a Markdown table: per cent of DRAWS (1,000) data sets whose 95 % interval holds the true value. WHAT is `normal`
or `exponential` for an AUROC of such scores, where constructions are compared: bootstraps of RESAMPLES (500) samples
within normal images and kinds of anomalous ones, Newcombe's method 5 (2006), and ours, DeLong on the logit scale.
`pair` is the difference of two methods with correlated scores (.7), `mean` the mean over ten classes, each against the
rest, and the difference of two such means. Each takes a few minutes and needs no files.

Normal: both kinds are normal with the same deviation. Exponential: scores are exponential, and those of three kinds of
anomalies have scales of .3, 1 and 3 times the mean one. Distances: squared distances to the own class's centre in 8
dimensions, classes having deviations of .7 to 1.4. The second method adds up absolute distances in 6 dimensions.
"""

import sys

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm

from panda_lightning.formulas import uncertainty
from panda_lightning.formulas.uncertainty import aurocs, difference, interval, resamples

Z = norm.ppf(0.975)
SIZES = ((1000, 20), (1000, 1000), (20, 1000), (60, 60), (20, 20))  # normal and anomalous images
SCALES = np.array([0.3, 1, 3])
CLASSES, SPREAD = 10, np.random.default_rng(0).permutation(np.geomspace(0.7, 1.4, 10))
CENTRES = np.random.default_rng(1).normal(size=(CLASSES, 8))


def draw(kind, truth, normal, anomalous, rng):
    """Scores, labels and groups."""
    label = np.arange(normal + anomalous) >= normal
    if kind == "normal":
        return rng.normal(size=len(label)) + label * np.sqrt(2) * norm.ppf(truth), label, label
    scale = brentq(lambda c: (c * SCALES / (1 + c * SCALES)).mean() - truth, 1e-3, 1e6) * SCALES
    group = np.where(label, np.arange(len(label)) % 3 + 1, 0)
    return rng.exponential(size=len(label)) * np.r_[1, scale][group], label, group


def draw_pair(kind, truths, normal, anomalous, rng):
    """Scores of two methods, and labels."""
    label = np.arange(normal + anomalous) >= normal
    first = rng.normal(size=len(label))
    second = 0.7 * first + np.sqrt(1 - 0.7**2) * rng.normal(size=len(label))
    found = []
    for score, truth in zip((first, second), truths, strict=True):
        if kind == "normal":
            found.append(score + label * np.sqrt(2) * norm.ppf(truth))
        else:
            found.append(-norm.logsf(score) * np.where(label, truth / (1 - truth), 1))
    return *found, label


def draw_classes(apart, images, rng):
    """Scores of two methods (CLASSES, N), and labels."""
    own = np.repeat(np.arange(CLASSES), images)
    points = apart * CENTRES[own] + SPREAD[own, None] * rng.normal(size=(len(own), 8))
    away = [points - apart * centre for centre in CENTRES]
    label = own != np.arange(CLASSES)[:, None]
    return np.stack([(a**2).sum(1) for a in away]), np.stack([abs(a[:, :6]).sum(1) for a in away]), label


def newcombe(value, normal, anomalous):
    """Method 5: where the estimate is z standard errors away, of the exponential model with mean sample sizes."""
    size = (normal + anomalous) / 2 - 1

    def gap(theta, sign):
        model = 1 + size * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return value - theta - sign * Z * np.sqrt(theta * (1 - theta) * model / (normal * anomalous))

    high = brentq(gap, value, 1 - 1e-15, args=(-1,)) if gap(1 - 1e-15, -1) < 0 < gap(value, -1) else 1
    return brentq(gap, 1e-12, value, args=(1,)), high


def bootstraps(score, label, value, weights):
    """Percentile, normal on the logit scale, and BCa intervals."""
    found, least = aurocs(score, label, weights), 0.5 / (label.sum() * (~label).sum())
    safe = logit(np.clip([value, *found], least, 1 - least))
    share = uncertainty._mean(score[None], label[None])[1]
    skew = (share**3).sum() / 6 / max((share**2).sum(), 1e-100) ** 1.5
    bias = norm.ppf(np.clip(((found < value).mean() + (found <= value).mean()) / 2, 1e-3, 1 - 1e-3))
    moved = bias + np.array([-Z, Z])
    yield np.quantile(found, [0.025, 0.975])
    yield expit(safe[0] + np.array([-Z, Z]) * safe[1:].std(ddof=1))
    yield np.quantile(found, norm.cdf(bias + moved / (1 - skew * moved)))


def percent(hits):
    """Of draws."""
    return f"{100 * np.mean(hits):.1f}" if len(hits) else "-"


def row(*cells):
    """Of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def one(kind, draws, samples):
    """Constructions for one AUROC."""
    head = "normal | anomalous | AUROC | percentile | bootstrap, logit | BCa | Newcombe 5 | DeLong, logit"
    row(head, "of these too high, too low", "estimate is 1", "reliable", "coverage of reliable ones")
    row(*["---"] * 12)
    for normal, anomalous in SIZES:
        for truth in (0.75, 0.95, 0.995):
            rng = np.random.default_rng(0)
            weights = resamples(draw(kind, truth, normal, anomalous, rng)[2], samples, 0)  # for all: they see no score
            hits, found = [], []
            for _ in range(draws):
                score, label, group = draw(kind, truth, normal, anomalous, rng)
                ours = interval(score, label, group)
                others = [*bootstraps(score, label, ours.value, weights), newcombe(ours.value, normal, anomalous)]
                hits.append([low <= truth <= high for low, high in [*others, (ours.low, ours.high)]])
                found.append((ours.low > truth, ours.high < truth, ours.value == 1, ours.reliable))
            hits, (over, under, perfect, sure) = np.array(hits), np.array(found).T
            cells = [f"{percent(over)}, {percent(under)}", *map(percent, (perfect, sure, hits[sure, -1]))]
            row(normal, anomalous, truth, *map(percent, hits.T), *cells)


def pair(draws, _):
    """Difference of two methods."""
    row("scores", "normal", "anomalous", "AUROCs", "DeLong", "reliable", "coverage of these")
    row(*["---"] * 7)
    for kind in ("normal", "exponential"):
        for normal, anomalous in SIZES:
            for truths in ((0.75, 0.75), (0.75, 0.8), (0.95, 0.95), (0.97, 0.95), (0.995, 0.995), (0.995, 0.99)):
                rng = np.random.default_rng(0)
                found = [difference(*draw_pair(kind, truths, normal, anomalous, rng)) for _ in range(draws)]
                hits = np.array([f.low <= truths[0] - truths[1] <= f.high for f in found])
                sure = np.array([f.reliable for f in found])
                row(kind, normal, anomalous, f"{truths[0]}, {truths[1]}", *map(percent, (hits, sure, hits[sure])))


def mean(draws, samples):
    """Means over classes, and their difference; bootstraps of a quarter of the draws."""
    row("AUROCs", "images a class", "mean: DeLong, logit", "percentile", "difference: DeLong", "percentile", "reliable")
    row(*["---"] * 7)
    for apart in (0.75, 1.5, 2.1):
        first, second, label = draw_classes(apart, 20000, np.random.default_rng(2))
        truth, other = (uncertainty._mean(s, label)[0] for s in (first, second))
        for images in (20, 100):
            rng, own = np.random.default_rng(3), np.repeat(np.arange(CLASSES), images)
            weights, hits, boot, sure = resamples(own, samples, 0), [], [], []
            for number in range(draws):
                first, second, label = draw_classes(apart, images, rng)
                level, gap = interval(first, label), difference(first, second, label)
                hits.append((level.low <= truth <= level.high, gap.low <= truth - other <= gap.high))
                sure.append(level.reliable)
                if number % 4 == 0:
                    pairs = [list(zip(scores, label, strict=True)) for scores in (first, second)]
                    one, two = (np.mean([aurocs(*pair, weights) for pair in rows], axis=0) for rows in pairs)
                    ends = [np.quantile(x, [0.025, 0.975]) for x in (one, one - two)]
                    boot.append([a <= t <= b for (a, b), t in zip(ends, (truth, truth - other), strict=True)])
            (ours, gaps), (plain, plain_gaps) = np.transpose(hits), np.transpose(boot)
            row(f"{truth:.4f}, {other:.4f}", images, *map(percent, (ours, plain, gaps, plain_gaps, sure)))


if __name__ == "__main__":
    what, sizes = sys.argv[1], [int(x) for x in sys.argv[2:]]
    sizes += (1000, 500)[len(sizes) :]
    {"pair": pair, "mean": mean}.get(what, lambda *sizes: one(what, *sizes))(*sizes)
