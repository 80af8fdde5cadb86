"""What EWC does: training far past the useful point with and without it.

    python experiments/ewc.py run SETTING OUT [VARIANT ...]    one JSON file a run; what is there is not run again
    python experiments/ewc.py draw OUT                         ewc.png and a table from these files

SETTING is one of SETTINGS below. A variant is `none`, or SOURCE:LAMBDA with SOURCE one of
    ones      L2 towards the start weights
    target    Fisher diagonal of the normal training images, labels drawn from the classifier (`fisher: auto`)
    FILE      a diagonal made by `panda fisher`, of the pretraining task
Steps are ten times as long as published (grad_clip 1e-2): 30 epochs go as far as 300.
"""

import json
import logging
import sys
from pathlib import Path

from curve import fit

from panda_lightning import CIFAR10, PANDA, Digits, ImageFolder
from panda_lightning.backbones import BUNDLED

MOBILENET = "local-dir:../shared/weights/mobilenetv2_100.in1k"
CIFAR = {"image_size": 112, "crop": "squash", "train_limit": 1500, "test_limit": 1000}
CATS = {"image_size": 160, "crop": "squash"}  # data made by link_cats_vs_dogs.py
SETTINGS = {  # data module, its arguments, backbone
    "cats": (ImageFolder, {"root": "data/cats_vs_dogs_small", "normal_class": "cat", **CATS}, MOBILENET),
    "airplane": (CIFAR10, {"normal_class": "airplane", **CIFAR}, MOBILENET),
    "bird": (CIFAR10, {"normal_class": "bird", **CIFAR}, MOBILENET),
    "digits": (Digits, {"normal_class": 8, "image_size": 64, "crop": "squash", "batch_size": 8}, "panda_tiny"),
}


def run(setting, out, variant, epochs=30):
    """Fit once, write the curve."""
    source, _, weight = variant.partition(":")
    path = Path(out) / f"{setting}-{Path(source).stem}{weight and f'-{weight}'}.json"
    if path.is_file():
        return
    kind, arguments, backbone = SETTINGS[setting]
    options = {"ewc_weight": float(weight or 0), "fisher": {"target": "auto", "none": "ones"}.get(source, source)}
    options |= {"grad_clip": 1e-2, "normalize": setting != "cats", "prefix_cache_dir": "data/cache"}
    if source == "target" and (BUNDLED / backbone).is_dir():  # a diagonal beside the weights would be taken
        options["weights"] = str(BUNDLED / backbone / "model.safetensors")
    data = kind(**arguments) if kind is Digits else kind(**{"root": "data", **arguments})
    rows = fit(PANDA(backbone, **options), data, epochs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "variant": variant, "rows": rows}, indent=0) + "\n")


def draw(out):
    """One panel a setting."""
    from matplotlib.figure import Figure

    found = [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))]
    settings = [name for name in SETTINGS if any(f["setting"] == name for f in found)]
    figure = Figure(figsize=(5 * len(settings), 4.2), layout="constrained")
    print("| data | variant | AUROC at 0 | best | last | distance from start |\n|---|---|---|---|---|---|")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        for one in (f for f in found if f["setting"] == setting):
            rows, name = one["rows"], one["variant"]
            source, _, weight = name.partition(":")
            style = {"none": "k-", "ones": ":", "target": "--"}.get(source, "-")
            label = f"{Path(source).stem} {weight}".strip()
            axes.plot([r["epoch"] for r in rows], [r["auroc"] for r in rows], style, label=label)
            aurocs = [r["auroc"] for r in rows]
            moved = rows[-1].get("train/distance_from_start", 0.0)
            print(f"| {setting} | {label} | {aurocs[0]:.4f} | {max(aurocs):.4f} | {aurocs[-1]:.4f} | {moved:.3g} |")
        axes.set(title=setting, xlabel="epochs, with steps ten times the published ones", ylabel="AUROC")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(Path(out) / "ewc.png", dpi=100)


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw(sys.argv[2])
    else:
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        for each in sys.argv[4:]:
            run(sys.argv[2], sys.argv[3], each)
            print(each, flush=True)
