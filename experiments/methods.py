"""Every method with settings that fit two cores; prints a row a run.

    python experiments/methods.py DATA OUTLIERS OUT [SET ...]    digits fashion_mnist cifar10 cats

DATA holds CIFAR-10, Fashion-MNIST and cats_vs_dogs_small (link_cats_vs_dogs.py), OUTLIERS is a folder of other images
or CLASS:ROOT. None of this is the published schedule. Digits (all there are), Fashion-MNIST, CIFAR-10: 1,000 training
and 1,000 test images; PANDA family: bundled network, 64 px, 4 epochs; Deep SVDD 15 + 15 epochs at 28 px (CIFAR-10: 32);
RotNet 10 epochs of a WideResNet-10-2 at 32 px and 300 test images. Cats: 1,499 training and 1,000 test images,
MobileNetV2, 160 px, 6 epochs (OE 2). EWC has lambda 350, which is the published 1e4 for batches of 32 turned into one
for a diagonal per image (RESULTS.md); it takes the bundled diagonal, and for cats FISHER of the environment, if set.
"""

import contextlib
import csv
import io
import os
import re
import sys
import time
import warnings
from pathlib import Path

from panda_lightning.cli import main

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=CSVLogger"]
KEYS = ("val/auroc_ses", "test/auroc_oracle", "val/auroc", "test/auroc")  # the method's own number, the first there is
CLASSES = {
    "digits": ("8", "9"),
    "fashion_mnist": ("T-shirt/top", "Sandal"),
    "cifar10": ("airplane", "automobile"),
    "cats": ("cat",),
}


def methods(name, data, outliers):
    """Words of each method: variant, label, words."""
    if name == "cats":
        family, epochs, fisher = [f"--data.root={data}/cats_vs_dogs_small"], (6, 2), os.environ.get("FISHER", "auto")
    else:
        small = [f"--data.root={data}", "--data.train_limit=1000", "--data.test_limit=1000"]
        family = [*small, "--model.backbone=panda_tiny", "--data.image_size=64", "--data.crop=squash"]
        epochs, fisher = (4, 4), "auto"
    few = [*family, f"--trainer.max_epochs={epochs[0]}"]
    yield "dn2", "DN2", family
    yield "dn2", "DN2, normalised", [*family, "--model.normalize=true"]
    yield "early", "Early", few
    yield "ses", "SES", few
    yield "ewc", "EWC", [*few, "--model.ewc_weight=350", f"--model.fisher={fisher}"]
    yield "msc", "MSC", few
    yield "oe", "OE", [*family, f"--trainer.max_epochs={epochs[1]}", f"--data.outliers={outliers}"]
    if name == "cats":
        return
    yield "ocsvm", "OC-SVM", small
    yield "ocsvm", "OC-SVM, oracle", [*small, "--model.select=test", "--model.inputs=pixels"]
    svdd = ["--trainer.max_epochs=30", "--model.pretrain_epochs=15", "--trainer.check_val_every_n_epoch=15"]
    yield "deep_svdd", "Deep SVDD", [*small, *svdd, *([] if name == "cifar10" else ["--data.image_size=28"])]
    rotnet = ["--trainer.max_epochs=10", "--trainer.check_val_every_n_epoch=10", "--model.depth=10", "--model.width=2"]
    yield "mhrot", "RotNet", [*small, *rotnet, "--data.test_limit=300"]


def run(config, variant, words, folder):
    """First and last AUROC of a run; of the untrained network, the first is DN2's."""
    logger = [f"--trainer.logger.save_dir={folder.parent}", f"--trainer.logger.name={folder.name}"]
    verb = "test" if variant in ("dn2", "ocsvm") else "fit"
    configs = [f"--config={config}", f"--config=conf/variants/{variant}.yaml"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([verb, *configs, *QUIET, *logger, *words])
    newest = max(folder.glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    with (newest / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    key = next(key for key in KEYS if any(row.get(key) for row in rows))
    values = [float(row[key]) for row in rows if row.get(key)]
    return (f"{values[0]:.4f} -> " if len(values) > 1 else "") + f"{values[-1]:.4f}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("| data | normal class | method | AUROC | seconds |\n|---|---|---|---|---|")
    for name in sys.argv[4:] or CLASSES:
        config = "experiments/cats_vs_dogs_small.yaml" if name == "cats" else f"conf/{name}.yaml"
        for normal in CLASSES[name]:
            for variant, label, words in methods(name, *sys.argv[1:3]):
                folder = Path(sys.argv[3]) / re.sub(r"\W+", "-", f"{name} {normal} {label}")
                begin = time.monotonic()
                found = run(config, variant, [*words, f"--data.normal_class={normal}"], folder)
                print(f"| {name} | {normal} | {label} | {found} | {time.monotonic() - begin:.0f} |", flush=True)
