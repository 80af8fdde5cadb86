"""How much of a score is the image's own, whatever is normal: python experiments/shared_score.py FOLDER [DATA NETWORK].

FOLDER holds the rows of a `panda table` whose classes share their test images. For each method that has all classes:
the share of the variance of log scores that lies between images' means over the classes; AUROC; and AUROC where the
mean over the other classes' models is taken off each log score. The last sees normal images of the other classes: it
explains scores, and is no detector. With DATA, the folder of CIFAR-10, and NETWORK, a backbone of the rows at 112 px:
the rank correlation of these means with the length of the frozen features.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from gains import Gains
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from panda_lightning import Backbone
from panda_lightning.datamodules import CIFAR10

SIDE = 112


def table(gains):
    """Log scores and labels of each whole method, (classes, images), images in the order of their index."""
    classes = gains.classes("DN2")
    for column in sorted({name for name, _ in gains.kept}):
        if gains.classes(column) == classes:
            rows = [gains.kept[column, normal] for normal in classes]
            orders = [np.argsort(row["index"]) for row in rows]
            scores, labels = (
                np.stack([np.asarray(row[key])[order] for row, order in zip(rows, orders, strict=True)])
                for key in ("score", "label")
            )
            yield column, np.log(scores.astype(np.float64)), labels


def auroc(scores, labels):
    """The mean over classes, in per cent."""
    return 100 * np.mean([roc_auc_score(label, score) for label, score in zip(labels, scores, strict=True)])


def lengths(root, network):
    """Euclidean lengths of the frozen features of the test images, in the order of their index."""
    backbone = Backbone.pretrained(network).eval()
    data = CIFAR10(root, normal_class="airplane", image_size=SIDE, crop="squash", interpolation=backbone.interpolation)
    data.prepare_data()
    data.setup("test")
    found = {}
    with torch.inference_mode():
        for batch in data.test_dataloader():
            for index, length in zip(
                batch["index"].tolist(), backbone(batch["image"]).norm(dim=1).tolist(), strict=True
            ):
                found[index] = length
    return np.array([found[index] for index in sorted(found)])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, *more = sys.argv[1:]
    own = lengths(*more) if more else None
    print("| method | share of variance | AUROC | less the other classes' mean | correlation with length |")
    print("|---|---|---|---|---|")
    for column, scores, labels in table(Gains(Path(folder))):
        mean = scores.mean(0)
        others = (scores.sum(0) - scores) / (len(scores) - 1)
        share = mean.var() / scores.var(1).mean()
        length = "" if own is None else f"{spearmanr(mean, own).statistic:.2f}"
        values = f"{auroc(scores, labels):.2f} | {auroc(scores - others, labels):.2f}"
        print(f"| {column} | {share:.2f} | {values} | {length} |")
