"""What lambda means with a Fisher diagonal of features, beside one of labels drawn from the classifier.

    python experiments/fisher_of_features.py FOLDER_OF_CATS [NETWORK ...]

First, for each network (names of model.backbone), both diagonals on the same images: the ratio of their sums, which
turns one lambda into the other; the rank correlation over parameters; and the ratio of the two penalties along a step
of compactness, which is what training meets. Then two digits are trained on with lambda turned so: AUROC after 15
epochs, and how far the weights went.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from scipy.stats import spearmanr

from panda_lightning import PANDA, Backbone
from panda_lightning.datamodules import Digits
from panda_lightning.formulas import fisher
from panda_lightning.pictures.view import View

NETWORKS = [
    "panda_tiny", "local-dir:../shared/weights/mobilenetv2_100.in1k",
    "local-dir:../shared/weights/tf_efficientnet_lite2.in1k",
]  # fmt: skip
COUNT, SIDE = 200, 128


def diagonals(backbone, batches):
    """By likelihood, of the same images."""
    found = {}
    for of in ("labels", "features"):
        estimator = fisher.Estimator(backbone, of=of)
        for batch in batches:
            estimator.add(batch)
        found[of] = estimator.diagonal()
    return found


def ratio(found):
    """Sum of labels' by sum of features'."""
    labels, features = (sum(float(t.sum()) for t in found[of].values()) for of in ("labels", "features"))
    return labels / features


def compare(folder, networks):
    """Print a row a network."""
    files = sorted(Path(folder).rglob("*.jpg"))
    files = files[:: max(1, len(files) // COUNT)][:COUNT]
    print("| network | sum, labels' / features' | rank correlation | penalty along a step, labels' / features' |")
    print("|---|---|---|---|")
    for name in networks:
        backbone = Backbone.pretrained(name)
        view = View(SIDE, "squash", SIDE, backbone.interpolation)
        images = torch.stack([torch.from_numpy(view(file).copy()) for file in files])
        batch = {"image": images, "label": torch.zeros(COUNT, dtype=torch.long), "index": torch.arange(COUNT)}
        found = diagonals(backbone, [batch])
        labels, features = (torch.cat([t.flatten() for t in found[of].values()]) for of in ("labels", "features"))
        some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:100_000]
        rank = spearmanr(labels[some], features[some]).statistic
        with torch.no_grad():
            centre = backbone(images).mean(dim=0)
        (backbone(images[:32]) - centre).square().mean().backward()
        step = torch.cat([p.grad.flatten().square() for p in backbone.trained().values()])
        along = float((labels * step).sum() / (features * step).sum())
        print(f"| {name.rpartition('/')[2]} | {ratio(found):.3g} | {rank:.2f} | {along:.3g} |", flush=True)


def digit(name):
    """Its images, for the bundled network."""
    return Digits(normal_class=name, image_size=64, crop="squash")


def train(work):
    """Print a row a digit and limit of the gradient."""
    print("\n| digit, clip | lambda 0 | labels, 350 | features, 350 times the ratio | features, 350 |")
    print("|---|---|---|---|---|")
    for name in ("2", "8"):
        data = digit(name)
        data.prepare_data()
        data.setup("fit")
        found = diagonals(Backbone.pretrained("panda_tiny"), list(data.normal_dataloader()))
        files = {of: Path(work, f"{name}-{of}.safetensors") for of in found}
        for of, diagonal in found.items():
            fisher.save(diagonal, files[of], {})
        print(f"(digit {name}: ratio of sums {ratio(found):.4f})")
        for clip in (0.01, 0.1):
            cells = []
            for of, weight in (
                ("labels", 0.0),
                ("labels", 350.0),
                ("features", 350 * ratio(found)),
                ("features", 350.0),
            ):
                pl.seed_everything(0, verbose=False)
                detector = PANDA("panda_tiny", ewc_weight=weight, fisher=str(files[of]), grad_clip=clip)
                trainer = pl.Trainer(
                    max_epochs=15, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                    default_root_dir=work,
                )  # fmt: skip
                trainer.fit(detector, digit(name))
                metrics = trainer.callback_metrics
                cells.append(f"{metrics['val/auroc']:.4f}, {metrics['train/distance_from_start']:.3f}")
            print(f"| {name}, {clip} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    compare(sys.argv[1], sys.argv[2:] or NETWORKS)
    with tempfile.TemporaryDirectory() as work:
        train(work)
