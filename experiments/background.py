"""DN2 beside a bank of other pictures, untrained: python experiments/background.py NAME DATA OUTLIERS NETWORK SIDE.

NAME is a DataModule whose classes share their test images, DATA its root, OUTLIERS what data.outliers takes, NETWORK a
backbone, SIDE pixels; normal classes may follow. A score is the log distance to the normal images, or that less the log
distance to the outliers: what both banks say alike, such as that an image has long features, cancels. Printed: AUROC in
per cent by class and in the mean, with raw features and with those of unit length; and what the outliers add, with
DeLong's paired 95 % interval.
"""

import sys
import warnings

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize

from panda_lightning import Backbone, datamodules
from panda_lightning.formulas.uncertainty import difference

K, SPACES = 2, (torch.nn.Identity(), normalize)


def features(backbone, batches):
    """Features (N, D), in the order of the batches."""
    with torch.inference_mode():
        return torch.cat([backbone(batch["image"]) for batch in batches])


def distance(queries, bank):
    """The log of the mean squared distance to the K nearest."""
    parts = [torch.cdist(part, bank.double()).topk(K, largest=False).values for part in queries.double().split(500)]
    return torch.cat(parts).square().mean(1).log().numpy()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    name, root, outliers, network, side, *classes = sys.argv[1:]
    kind = getattr(datamodules, name)
    backbone = Backbone.pretrained(network).eval()
    view = {"image_size": int(side), "crop": "squash", "interpolation": backbone.interpolation}
    test, scores, labels = None, [], []
    print("| normal class | DN2 | less outliers | DN2, normalised | less outliers, normalised |\n|---|---|---|---|---|")
    for normal in classes or kind.classes:
        data = kind(root, normal_class=normal, outliers=outliers, **view)
        data.prepare_data()
        data.setup("fit")
        bank = features(backbone, data.normal_dataloader())
        if test is None:
            test, other = (features(backbone, part) for part in (data.test_dataloader(), data.outlier_dataloader()))
            common = [distance(space(test), space(other)) for space in SPACES]
        label = torch.cat([batch["label"] for batch in data.test_dataloader()]).numpy()
        found = []
        for space, outlying in zip(SPACES, common, strict=True):
            own = distance(space(test), space(bank))
            found += [own, own - outlying]
        scores.append(found)
        labels.append(label)
        print(f"| {normal} | {' | '.join(f'{100 * roc_auc_score(label, score):.2f}' for score in found)} |", flush=True)
    table, known = np.stack(scores, 1), np.stack(labels)
    means = (np.mean([roc_auc_score(*pair) for pair in zip(known, scored, strict=True)]) for scored in table)
    print(f"| mean | {' | '.join(f'{100 * mean:.2f}' for mean in means)} |")
    for space, place in (("raw", 0), ("normalised", 2)):
        gain = difference(table[place + 1], table[place], known)
        print(f"{space}: {100 * gain.value:+.2f} [{100 * gain.low:.2f}, {100 * gain.high:.2f}]")
