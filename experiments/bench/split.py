"""A training epoch from what the frozen layers made of each image, against one from the images.

    python experiments/bench/split.py vit_small_patch14_dinov2 224 convnext_tiny 224

Arguments: timm name, pixels, as often as wanted. Random weights, which cost the same as trained ones; 32 images;
medians of five alternating rounds.
"""

import sys
from statistics import median

import timm
import torch
from clock import DEVICE, clock

from panda_lightning import Backbone
from panda_lightning.networks.loading import takes


def main(name, pixels):
    """Print the row of one network."""
    args = {"dynamic_img_size": True} if takes(name, "dynamic_img_size") else {}
    backbone = Backbone(timm.create_model(name, num_classes=10, **args), 2, args).to(DEVICE)
    images = torch.randint(0, 256, (32, 3, pixels, pixels), dtype=torch.uint8, device=DEVICE)
    hidden = backbone.prefix(images)

    def step(x):
        backbone.zero_grad(set_to_none=True)
        backbone(x).square().mean().backward()

    times = {"kept": [], "whole": [], "once": []}
    for _ in range(6):
        for key, work in (
            ("kept", lambda: step(hidden)),
            ("whole", lambda: step(images)),
            ("once", lambda: backbone.prefix(images)),
        ):
            times[key].append(clock(work))
    kept, whole, once = (1000 * median(times[key][1:]) / len(images) for key in ("kept", "whole", "once"))
    gain = median(w / k for w, k in zip(times["whole"][1:], times["kept"][1:], strict=True))
    print(
        f"| {name}, {pixels} px, from {backbone.flow.entry} | {once:.1f} | {kept:.1f} | {whole:.1f} | {gain:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    print("| | frozen layers, once, ms an image | a step from there | a step from images | ratio |")
    print("|---|---|---|---|---|")
    words = sys.argv[1:] or ["vit_small_patch14_dinov2", "224", "convnext_tiny", "224"]
    for at in range(0, len(words), 2):
        main(words[at], int(words[at + 1]))
