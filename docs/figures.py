"""Draw the pictures of docs/pages/concepts: ``python docs/figures.py`` writes docs/pages/assets/*.png.

Each is made from runs of the package on scikit-learn's digits with the bundled network panda_tiny at 64 px, except for
panda-5 and ewc-1, which show the recorded runs in experiments/results/ewc (see experiments/RESULTS.md). It takes about
a minute on one core, three on a busy machine, and downloads nothing. What the texts quote is printed.
"""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image

from panda_lightning import DN2, OCSVM, PANDA, Backbone, Digits
from panda_lightning.callbacks.report import Report
from panda_lightning.formulas.conformal import p_values
from panda_lightning.formulas.fisher import Estimator
from panda_lightning.formulas.uncertainty import average_precision, fpr_at_tpr, interval

ASSETS = Path(__file__).parent / "pages" / "assets"
ROWS = Path(__file__).parents[1] / "experiments" / "results" / "ewc"
BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#767676"  # Okabe and Ito
FIGURES = {}
EPOCHS, CLIP = 30, 0.3  # steps 300 times the published: chosen with labels, so that 90 images show an effect
mpl.rc("font", size=10)
mpl.rc(("xtick", "ytick"), labelsize=9)
mpl.rc("axes", titlesize=10, grid=True)
mpl.rc("axes.spines", top=False, right=False)
mpl.rc("legend", fontsize=9, frameon=False)
mpl.rc("grid", alpha=0.25)


def panels(name, columns=2, height=3.0, rows=1):
    """Axes (R, C) of a picture. It is 7.2 inches wide, as a page shows it, so that points are points."""
    figure = FIGURES[name] = Figure(figsize=(7.2, height), layout="constrained")
    return figure.subplots(rows, columns, squeeze=False)


def digits(**options):
    """The data as conf/digits.yaml has them."""
    return Digits(**{"normal_class": 9, "image_size": 64, "crop": "squash", "batch_size": 8, **options})


def run(detector, data, epochs=0):
    """Fit so many epochs, or only test. Returns the scores of the test images, their labels, and a row an epoch."""
    pl.seed_everything(0, verbose=False)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        own = {"max_epochs": max(1, epochs), "num_sanity_val_steps": 0, "default_root_dir": folder}
        trainer = pl.Trainer(accelerator="cpu", **own, **off)
        trainer.fit(detector, data) if epochs else trainer.test(detector, data, verbose=False)
    rows = next(callback.rows for callback in trainer.callbacks if isinstance(callback, Report))
    return detector.scores.score.double().numpy(), detector.scores.label.numpy().astype(bool), rows


def histogram(ax, score, label, bins, name):
    """Normal and anomalous scores, as shares of either kind."""
    for rows, colour, kind in ((~label, BLUE, "normal"), (label, ORANGE, "anomalous")):
        weights = np.full(rows.sum(), 1 / rows.sum())
        ax.hist(score[rows], bins, weights=weights, color=colour, alpha=0.65, label=f"{kind} ({rows.sum()})")
    ax.set(ylabel="share of images", xlabel=name)


def roc(ax, score, label, colour, style, name=""):
    """A ROC curve, and where it finds 95 % of the anomalies."""
    steps = np.unique(score)[::-1, None]
    found, false = ([0, *(score[rows] >= steps).mean(axis=1)] for rows in (label, ~label))
    ax.plot(false, found, style, color=colour, label=f"{name}AUROC {interval(score, label).value:.3f}")
    ax.plot([fpr_at_tpr(score, label)], [0.95], "o", color=colour, markersize=7)
    ax.axhline(0.95, color=GREY, linewidth=1, linestyle=":")
    ax.set(xlabel="false alarms (share of normal images)", ylabel="anomalies found", xlim=(-0.01, 1), ylim=(0, 1.01))


def neighbours(detector, data, score, label):
    """Test images over the two normal images that are nearest to them."""
    kind, tests, bank = data.test_images.targets, list(data.test_images.sources), data.normal_images.sources
    by_score = {digit: np.flatnonzero(kind == digit)[np.argsort(score[kind == digit])] for digit in range(10)}
    chosen = [by_score[9][9], by_score[9][45], by_score[9][-1], by_score[0][44], by_score[7][45], by_score[3][0]]
    found, names = detector.score([tests[i] for i in chosen]), data.names(data.normal_images)
    axes = panels("panda-1-neighbours", 6, 3.9, 3)
    for i, (row, column) in enumerate(zip(chosen, axes.T, strict=True)):
        near = [bank[names.index(str(name))] for name in found.neighbours[i][:2]]
        what, colour = ("anomalous", ORANGE) if label[row] else ("normal", BLUE)
        for ax, picture in zip(column, [tests[row], *near], strict=True):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
        for spine in column[0].spines.values():
            spine.set(visible=True, color=colour, linewidth=4)
        column[0].set_title(f"{what}: {kind[row]}\nscore {found.score[i]:.1f}")
        for ax, distance in zip(column[1:], found.distances[i], strict=False):
            ax.set_xlabel(f"{distance:.2f}", labelpad=2)
    [ax.set_ylabel(text) for ax, text in zip(axes[:, 0], ("test image", "nearest", "2nd nearest"), strict=True)]


def adaptation(score, label, adapted, curves):
    """DN2's scores and ROC curve; scores before and after in units of the normal median; both over epochs."""
    [(left, right)] = panels("panda-2-scores")
    histogram(left, score, label, np.linspace(0, 14, 36), "anomaly score (DN2)")
    roc(right, score, label, "black", "-")
    [axes] = panels("panda-3-compactness")
    for ax, values, name in zip(axes, (score, adapted), ("DN2, no training", f"{EPOCHS} epochs"), strict=True):
        normal, anomalous = np.median(values[~label]), np.median(values[label])
        histogram(ax, values / normal, label, np.linspace(0, 5, 36), "score / median of the normal images")
        ax.axvline(1, color=BLUE)
        ax.axvline(anomalous / normal, color=RED, linestyle="--")
        ax.set(title=f"{name}: medians {normal:.2f} and {anomalous:.2f}", ylim=(0, 0.3))
    [(left, right)] = panels("panda-4-epochs")
    for rows, colour, style, name in zip(curves, (RED, BLUE), ("-", "--"), ("no EWC", "EWC, lambda 100"), strict=True):
        at = [row["epochs_trained"] for row in rows]
        left.plot(at, [row["val/auroc"] for row in rows], style, color=colour, label=name)
        loss = [row["train/compactness"] for row in rows[1:]]
        right.plot(at[1:], loss, style, color=colour, label=f"compactness, {name}")
        print(name, {key: value for key, value in rows[-1].items() if key == "val/auroc" or key[:6] == "train/"})
    right.plot(at[1:], [row["train/ewc"] for row in rows[1:]], ":", color=GREEN, label="lambda x EWC term")
    left.set(xlabel="epochs (0 is DN2)", ylabel="AUROC of the test images")
    right.set(xlabel="epochs", ylabel="mean over the epoch", ylim=(0, 0.0145))


def collapse():
    """The recorded long runs: cats for one page, the others for another."""
    lines = {"none": ("no EWC", RED, "-"), "target-100": ("Fisher, lambda 100", BLUE, "--")}
    lines |= {"target-10000": ("Fisher, lambda 10,000", GREEN, ":"), "ones-15": ("Fisher = 1, lambda 15", GREY, "-.")}
    [[cats]], [three] = panels("panda-5-collapse", 1), panels("ewc-1-lambda", 3, 3.3)
    for ax, setting in zip((cats, *three), ("cats", "airplane", "bird", "digits"), strict=True):
        for variant, (name, colour, style) in lines.items():
            if (path := ROWS / f"{setting}-{variant}.json").is_file():
                rows = json.loads(path.read_text("utf-8"))["rows"]
                ax.plot([row["epoch"] for row in rows], [row["auroc"] for row in rows], style, color=colour, label=name)
        ax.set(xlabel="epochs (long steps)", ylabel="AUROC" if ax is three[0] else "", title=setting)
    cats.set(ylabel="AUROC", title="cats against dogs")
    three[0].figure.legend(*three[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def fisher(data):
    """Where the diagonal is large, and what squaring means over batches does to it."""
    network, found = Backbone.pretrained("panda_tiny", None, 2), []
    for group in (1, 32):
        estimator = Estimator(network, group=group)
        for batch in data.normal_dataloader():
            estimator.add(batch)
        found.append(torch.cat([part.flatten() for part in estimator.diagonal().values()]).double().numpy())
    each, means = found
    share = np.cumsum(np.sort(each)[::-1]) / each.sum()
    [(left, right)] = panels("ewc-2-fisher")
    left.plot(100 * np.arange(1, len(share) + 1) / len(share), share, color=BLUE)
    for level in (0.5, 0.9):
        place = 100 * (share < level).mean()
        left.plot([place], [level], "o", color=RED)
        left.annotate(f"{place:.1f} %", (place, level), (-6, 4), textcoords="offset points", ha="right")
    left.set(xscale="log", xlim=(0.01, 100), xlabel="per cent of the weights, largest first", ylabel="share of the sum")
    left.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    ratio = each[means > 0] / means[means > 0]
    right.hist(np.log10(ratio), np.linspace(0.7, 2.3, 61), color=SKY, weights=np.full(len(ratio), 1 / len(ratio)))
    right.axvline(np.log10(32), color=RED, linestyle="--")
    right.set_xticks(np.log10([5, 10, 20, 32, 50, 100, 200]), ["5", "10", "20", "32", "50", "100", "200"])
    right.set(xlabel="one per image / one per batch of 32", ylabel="share of the weights")
    print("zeros", (each == 0).mean(), "ratio of sums", each.sum() / means.sum(), "median ratio", np.median(ratio))


def decisions(data):
    """Scores and p-values of one calibration; false alarms of many, and of images that have changed."""
    detector = DN2("panda_tiny")
    (score, label, _), bins = run(detector, data), np.linspace(0, 14, 36)
    p, weights = p_values(held := detector.calibration.scores, score), np.full(len(held), 1 / len(held))
    [(left, right)] = panels("thresholds-1-p-values")
    histogram(left, score, label, bins, "anomaly score")
    left.hist(held, bins, weights=weights, histtype="step", color="black", label=f"held back ({len(held)})")
    left.axvline(score[p > 0.05].max(), color=RED, linestyle="--", label="alpha = 0.05")
    histogram(right, p, label, np.linspace(0, 1, 21), "p-value")
    right.axhline(0.05, color="black", linewidth=1.2, linestyle=":", label="uniform")
    print(f"alpha .05: {(p[~label] <= 0.05).mean():.3f} of normal images, {(p[label] <= 0.05).mean():.3f} of anomalous")
    [(left, right)] = panels("thresholds-2-guarantee")
    rng, pool = np.random.default_rng(0), np.concatenate([held, score[~label]])
    for count, colour in ((19, ORANGE), (99, SKY), (399, BLUE)):
        orders = [rng.permutation(pool) for _ in range(1000)]
        false = [(p_values(order[:count], order[-500:]) <= 0.05).mean() for order in orders]
        left.hist(false, np.arange(-0.001, 0.26, 0.01), color=colour, histtype="step", label=f"{count} held back")
        print(f"{count} held back: mean {np.mean(false):.3f}, 90 % within {np.quantile(false, [0.05, 0.95]).round(3)}")
    left.axvline(0.05, color=RED, linestyle="--", label="alpha = 0.05")
    left.set(xlabel="false alarms (share of normal images)", ylabel="of 1,000 calibrations")
    changes = {"unchanged": lambda a: a, "one pixel right": lambda a: np.roll(a, 1, axis=1)}
    changes |= {f"{100 - by} % darker": lambda a, by=by: (by / 100 * a).astype(np.uint8) for by in (90, 80, 60)}
    normal = [image for image, anomalous in zip(data.test_images.sources, label, strict=True) if not anomalous]
    flagged = [detector.score([change(a) for a in normal], alpha=0.05).anomalous.mean() for change in changes.values()]
    right.bar_label(right.barh(list(changes), flagged, color=BLUE), [f"{100 * f:.0f} %" for f in flagged], padding=3)
    right.axvline(0.05, color=RED, linestyle="--")
    right.set(xlabel="normal images flagged (alpha = 0.05)", xlim=(0, 0.55), ylim=(4.6, -0.6))
    right.grid(axis="y", visible=False)


def hidden(data, score, label):
    """Two ROC curves of nearly the same area; average precision by prevalence; AUROC by kind of anomaly."""
    [(left, right)] = panels("auroc-1-thresholds")
    lines = (("DN2", DN2("panda_tiny"), 64, BLUE, "-"), ("OC-SVM", OCSVM(), 32, RED, "--"))
    for name, detector, side, colour, style in lines:
        eights, other, _ = run(detector, digits(normal_class=8, image_size=side))
        roc(left, eights, other, colour, style, f"{name}: ")
        print(name, interval(eights, other), fpr_at_tpr(eights, other), average_precision(eights, other))
    order, shares = np.argsort(-score), np.geomspace(0.001, 0.9, 40)
    found, false = (np.cumsum(rows[order]) / rows.sum() for rows in (label, ~label))
    precision = shares[:, None] * found / (shares[:, None] * found + (1 - shares[:, None]) * false)
    values, auroc = (precision * np.diff(found, prepend=0)).sum(axis=1), interval(score, label).value
    print([(share, round(float(np.interp(share, shares, values)), 3)) for share in (0.001, 0.01, 0.1, 0.5, 0.9)])
    right.plot(shares, values, color=BLUE, label="average precision")
    right.axhline(auroc, color="black", linestyle="--", label="AUROC")
    right.set(xscale="log", xlabel="share of anomalies among the images", ylim=(0, 1.02), title="DN2, normal: 9")
    left.set(title="normal: 8")
    right.set_xticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
    each = [interval(score[rows], label[rows]) for rows in ((data.test_images.targets == k) | ~label for k in range(9))]
    kinds = sorted(range(9), key=lambda kind: each[kind].value)
    middle, low, high = np.array([[each[k].value, each[k].low, each[k].high] for k in kinds]).T
    [[ax]] = panels("auroc-2-kinds", 1)
    ax.errorbar(range(9), middle, [middle - low, high - middle], fmt="o", color=BLUE, capsize=4)
    ax.axhline(auroc, color=RED, linestyle="--", label="all kinds together")
    ax.set_xticks(range(9), [str(kind) for kind in kinds])
    ax.set(xlabel="kind of anomaly (nines are normal)", ylabel="AUROC against this kind")


def main():
    """Draw all of them."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    collapse()
    data, detector = digits(), DN2("panda_tiny")
    neighbours(detector, data, *(known := run(detector, data)[:2]))
    fits = [run(PANDA("panda_tiny", ewc_weight=w, grad_clip=CLIP), digits(), EPOCHS) for w in (0, 100)]
    adaptation(*known, fits[0][0], [curve for _, _, curve in fits])
    fisher(digits(normal_class=0, protocol="leave_one_out"))
    decisions(digits(normal_class=0, protocol="leave_one_out", calibration_fraction=0.5))
    hidden(data, *known)
    for name, figure in FIGURES.items():  # in few colours, which makes small files
        for ax in () if figure.legends else (ax for ax in figure.axes if ax.get_legend_handles_labels()[0]):
            ax.legend()
        figure.savefig(buffer := io.BytesIO(), dpi=160, facecolor="white")
        Image.open(buffer).convert("RGB").quantize(96).save(ASSETS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
