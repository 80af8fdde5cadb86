"""Seconds and memory an image of SPADE and PatchCore, by phase, on made-up pictures with random weights.

    python experiments/bench/segmentation.py [--size 256] [--train 209] [--test 16] [NETWORK ...]

Milliseconds an image. One process a row, since peak memory is that of a process. As many normal images as bottle of
MVTec AD has.
"""

import argparse
import resource
import subprocess
import sys

import timm
import torch
from clock import DEVICE, clock

from panda_lightning import SPADE, Backbone, PatchCore
from panda_lightning.formulas.pixel_metrics import PixelHistogram
from panda_lightning.search.coreset import greedy_coreset

METHODS = {"SPADE": SPADE, "PatchCore": PatchCore}


def timed(work):
    """What a piece of work gives, and its seconds."""
    found = []
    seconds = clock(lambda: found.append(work()))
    return found[0], seconds


def row(method, network, size, train, test):
    """Print one row of the table."""
    torch.manual_seed(0)
    detector = METHODS[method]()
    detector.backbone = Backbone(timm.create_model(network), 0)
    detector.to(DEVICE)
    pictures = torch.randint(0, 256, (max(train, test), 3, size, size), dtype=torch.uint8, device=DEVICE)
    batches = [{"image": part} for part in torch.split(pictures[:train], 16)]
    with torch.inference_mode():
        detector.embed({"image": pictures[:2]})
        parts, extraction = timed(lambda: [detector.embed(batch) for batch in batches])
        bank, selection = torch.cat(parts), 0.0
        del parts
        if method == "PatchCore":
            bank = bank.flatten(0, 1)
            size_wanted = round(detector.coreset * len(bank))
            chosen, selection = timed(lambda: torch.cat([rows for rows, _ in greedy_coreset(bank, size_wanted)]))
            bank = bank[chosen]
        detector.bank = bank
        detector.fit_index()
        queries = {"image": pictures[:test]}
        _, embedding = timed(lambda: detector.embed(queries))
        found, scoring = timed(lambda: detector.score_and_map(queries))
        maps, smoothing = timed(lambda: detector._smoothed(found["map"]))
        masks = torch.zeros(test, size, size, dtype=torch.bool)
        masks[: test // 2, 10:40, 10:40] = True
        pixels = PixelHistogram()
        counting, computing = clock(lambda: pixels.add(maps, masks)), clock(pixels.metrics)
    each = [extraction / train, selection / train, embedding / test, (scoring - embedding + smoothing) / test]
    print(f"| {method}, {network} | " + " | ".join(f"{1000 * s:.0f}" for s in each), end="")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f" | {1000 * counting / test:.1f} | {1000 * computing:.0f} | {len(bank):,} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["mobilenetv2_100", "wide_resnet50_2"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--train", type=int, default=209)
    parser.add_argument("--test", type=int, default=16)
    parser.add_argument("--only")
    options = parser.parse_args()
    if options.only:
        row(options.only, options.networks[0], options.size, options.train, options.test)
    else:
        heads = ("", "bank: extraction", "coreset", "test: extraction", "search and map", "counting of pixels")
        heads += ("metrics of all, ms once", "entries", "peak GiB")
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        for network in options.networks:
            for method in METHODS:
                words = [f"--size={options.size}", f"--train={options.train}", f"--test={options.test}"]
                subprocess.run([sys.executable, __file__, network, f"--only={method}", *words], check=True)
