"""What EWC does: training far past the useful point with and without it.

    python experiments/ewc.py run SETTING OUT [VARIANT ...]    one JSON file a run; what is there is not run again
    python experiments/ewc.py draw OUT                         ewc.png and a table from these files

SETTING is one of SETTINGS below. A variant is `none`, or SOURCE:LAMBDA with SOURCE one of
    ones      L2 towards the start weights
    target    Fisher diagonal of the normal training images, labels drawn from the classifier (`fisher: auto`)
    FILE      a diagonal made by `panda fisher`, of the pretraining task
Steps on MobileNetV2 are ten times as long as published (grad_clip 1e-2), so 30 epochs go as far as 300; those on the
bundled network, whose gradients are small, are hardly clipped (1).
"""

import json
import logging
import sys
from pathlib import Path

from curve import fit

from panda_lightning import CIFAR10, PANDA, Digits, ImageFolder

MOBILENET = "local-dir:../shared/weights/mobilenetv2_100.in1k"
CIFAR = {"image_size": 112, "crop": "squash", "train_limit": 1500, "test_limit": 1000}
CATS = {"image_size": 160, "crop": "squash"}  # data made by link_cats_vs_dogs.py
DIGITS = {"image_size": 64, "crop": "squash", "batch_size": 8}
SETTINGS = {  # data module, its arguments, backbone, epochs, grad_clip
    "cats": (ImageFolder, {"root": "data/cats_vs_dogs_small", "normal_class": "cat", **CATS}, MOBILENET, 30, 1e-2),
    "airplane": (CIFAR10, {"normal_class": "airplane", **CIFAR}, MOBILENET, 30, 1e-2),
    "bird": (CIFAR10, {"normal_class": "bird", **CIFAR}, MOBILENET, 30, 1e-2),
    "digits": (Digits, {"normal_class": 9, **DIGITS}, "panda_tiny", 60, 1.0),
}


def run(setting, out, variant):
    """Fit once, write the curve."""
    source, _, weight = variant.partition(":")
    path = Path(out) / f"{setting}-{Path(source).stem}{weight and f'-{weight}'}.json"
    if path.is_file():
        return
    kind, arguments, backbone, epochs, clip = SETTINGS[setting]
    options = {"ewc_weight": float(weight or 0), "fisher": {"target": "auto", "none": "ones"}.get(source, source)}
    options |= {"grad_clip": clip, "normalize": kind is CIFAR10, "prefix_cache_dir": "data/cache"}
    detector = PANDA(backbone, **options)
    detector.load_backbone()
    if source == "target":
        detector.backbone.fisher_file = None  # a diagonal beside the weights would be taken
    rows = fit(detector, kind(**{"root": "data", **arguments}), epochs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "variant": variant, "rows": rows}, indent=0) + "\n")


FAMILIES = {"none": "no EWC", "ones": "Fisher = 1", "target": "target images"}  # a file: the pretraining task
COLOURS = {"no EWC": "black", "Fisher = 1": "tab:blue", "target images": "tab:orange", "pretraining task": "tab:green"}
STYLES = {0: "-", 0.01: ":", 0.15: ":", 1: "--", 15: "-", 100: "-", 350: "--", 1e4: "-."}  # by lambda


def draw(out):
    """One panel a setting, and a table."""
    from matplotlib.figure import Figure

    found = [json.loads(path.read_text()) for path in Path(out).glob("*.json")]
    for one in found:
        source, _, weight = one["variant"].partition(":")
        one["family"], one["weight"] = FAMILIES.get(source, "pretraining task"), float(weight or 0)
    found.sort(key=lambda one: (list(COLOURS).index(one["family"]), one["weight"]))
    settings = [name for name in SETTINGS if any(one["setting"] == name for one in found)]
    figure = Figure(figsize=(14, 4.2 * -(-len(settings) // 2)), layout="constrained")
    print("| data | Fisher | lambda | AUROC at 0 | best epoch (oracle) | last | compactness | EWC / lambda |")
    print("|---|---|---|---|---|---|---|---|")
    panels = figure.subplots(-(-len(settings) // 2), 2, squeeze=False).flat
    for axes, setting in zip(panels, settings, strict=False):
        for one in (one for one in found if one["setting"] == setting):
            aurocs, last, weight = [row["auroc"] for row in one["rows"]], one["rows"][-1], one["weight"]
            label = f"{one['family']}, lambda {weight:g}" if weight else one["family"]
            epochs = [row["epoch"] for row in one["rows"]]
            axes.plot(epochs, aurocs, STYLES[weight], color=COLOURS[one["family"]], label=label)
            term = f"{last['train/ewc'] / weight:.2g}" if weight else ""
            numbers = f"{aurocs[0]:.4f} | {max(aurocs):.4f} | {aurocs[-1]:.4f} | {last['train/compactness']:.3f}"
            print(f"| {setting} | {one['family']} | {weight:g} | {numbers} | {term} |")
        axes.set(title=setting, xlabel="epochs", ylabel="AUROC")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(Path(out) / "ewc.png", dpi=75)


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw(sys.argv[2])
    else:
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        for each in sys.argv[4:]:
            run(sys.argv[2], sys.argv[3], each)
            print(each, flush=True)
