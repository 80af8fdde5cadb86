"""DN2 beside a bank of other pictures, untrained: python experiments/background.py DATA OUTLIERS NETWORK [CLASS ...].

DATA is the folder of CIFAR-10, OUTLIERS an .npy of tiny_outliers.py, NETWORK a backbone. A score is the log distance to
the normal images, or that less the log distance to the outliers: what both banks say alike, such as that an image has
long features, cancels. Printed: AUROC in per cent by class and in the mean, with raw features and with those of unit
length, at 112 px; and what the outliers add, with DeLong's paired 95 % interval.
"""

import sys
import warnings

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize

from panda_lightning import Backbone
from panda_lightning.datamodules import CIFAR10
from panda_lightning.formulas.uncertainty import difference
from panda_lightning.pictures.view import View

SIDE, K = 112, 2


def features(backbone, batches):
    """Features (N, D), in the order of the batches."""
    with torch.inference_mode():
        return torch.cat([backbone(batch["image"]) for batch in batches])


def pictures(path, view):
    """The outliers in batches, as the network sees images."""
    images = np.load(path)
    for start in range(0, len(images), 64):
        yield {"image": torch.stack([torch.from_numpy(view(image).copy()) for image in images[start : start + 64]])}


def distance(queries, bank):
    """The log of the mean squared distance to the K nearest."""
    parts = [torch.cdist(part, bank.double()).topk(K, largest=False).values for part in queries.double().split(500)]
    return torch.cat(parts).square().mean(1).log().numpy()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    root, outliers, network, *classes = sys.argv[1:]
    backbone = Backbone.pretrained(network).eval()
    other = features(backbone, pictures(outliers, View(SIDE, "squash", SIDE, backbone.interpolation)))
    test, scores, labels = None, [], []
    print("| normal class | DN2 | less outliers | DN2, normalised | less outliers, normalised |\n|---|---|---|---|---|")
    for normal in classes or CIFAR10.classes:
        data = CIFAR10(root, normal_class=normal, image_size=SIDE, crop="squash", interpolation=backbone.interpolation)
        data.prepare_data()
        data.setup("fit")
        bank = features(backbone, data.normal_dataloader())
        test = features(backbone, data.test_dataloader()) if test is None else test
        label = torch.cat([batch["label"] for batch in data.test_dataloader()]).numpy()
        found = []
        for space in (lambda x: x, normalize):
            own, common = distance(space(test), space(bank)), distance(space(test), space(other))
            found += [own, own - common]
        scores.append(found)
        labels.append(label)
        print(f"| {normal} | {' | '.join(f'{100 * roc_auc_score(label, score):.2f}' for score in found)} |", flush=True)
    table, known = np.stack(scores, 1), np.stack(labels)
    means = (np.mean([roc_auc_score(*pair) for pair in zip(known, kind, strict=True)]) for kind in table)
    print(f"| mean | {' | '.join(f'{100 * mean:.2f}' for mean in means)} |")
    for name, place in (("raw", 0), ("normalised", 2)):
        gain = difference(table[place + 1], table[place], known)
        print(f"{name}: {100 * gain.value:+.2f} [{100 * gain.low:.2f}, {100 * gain.high:.2f}]")
