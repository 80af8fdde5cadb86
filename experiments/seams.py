"""Whether tiles leave seams in maps: python experiments/seams.py ROOT NETWORK [FILE.csv].

ROOT holds ../shared/data unpacked (mvtec), NETWORK is as --model.backbone takes it. PatchCore at 512 px, levels 2 and
3, not smoothed, each row with a bank of its own: leather (4 normal images, coreset .1) and bottle (20 of them, coreset
.02; 20 test images). A jump is the difference of a map's values at two neighbouring pixels.

seam: mean absolute jump across inner edges of tiles over that 16 px and more away from them.
whole: the same places in the maps of whole images, which have no seams: what the pictures themselves do there.
difference: mean absolute difference to the maps of whole images over the mean of those.
cpu_ms: of one core, for an image's map.
pixel_auroc: of leather's pixels, smoothed as by default (sigma 4).
"""

import csv
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from panda_lightning import PatchCore
from panda_lightning.formulas.pixel_metrics import PixelHistogram
from panda_lightning.networks.tiles import places
from panda_lightning.pictures.layout import images_below
from panda_lightning.search.coreset import greedy_coreset

SIDE, STRIDE, APART, BATCH = 512, 16, 16, 8
SETTINGS = [(None, 0), (256, 0), (256, 32), (256, 64), (256, 128)]
DATA = {"leather": (4, 0.1), "bottle": (20, 0.02)}  # normal images, coreset
HEAD = ("data", "tile", "overlap", "tiles", "seam", "whole", "difference", "pixel_auroc", "cpu_ms")


def read(paths: Sequence[Path]) -> Tensor:
    """Images (N, 3, SIDE, SIDE) uint8."""
    shown = (Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for path in paths)
    return torch.from_numpy(np.stack([np.asarray(image) for image in shown])).permute(0, 3, 1, 2)


def masks(paths: Sequence[Path]) -> Tensor:
    """Anomalous pixels (N, SIDE, SIDE) of test images."""
    found = torch.zeros(len(paths), SIDE, SIDE, dtype=torch.bool)
    for i, path in enumerate(paths):
        if path.parent.name != "good":
            (file,) = (path.parents[2] / "ground_truth" / path.parent.name).glob(f"{path.stem}_mask.*")
            mask = Image.open(file).convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            found[i] = torch.from_numpy(np.array(mask) > 127)
    return found


def ratio(maps: Tensor, edges: Sequence[int]) -> float:
    """Mean absolute jump across edges, both ways, over that away from them."""
    jumps = torch.cat([maps.diff(dim=2), maps.diff(dim=1).mT]).abs()  # (2 N, SIDE, SIDE - 1), between x and x + 1
    away = (torch.arange(1, SIDE).unsqueeze(1) - torch.tensor(edges)).abs().amin(dim=1) >= APART
    return float(jumps[:, :, torch.tensor(edges) - 1].mean() / jumps[:, :, away].mean())


@torch.no_grad()
def scored(network: str, setting: tuple[int | None, int], normal: Tensor, test: Tensor, coreset: float) -> tuple:
    """The maps of test images, not smoothed and smoothed, and seconds of CPU an image."""
    detector = PatchCore(network, tile=setting[0], overlap=setting[1])
    detector.load_backbone()
    patches = torch.cat([detector.embed({"image": part}).flatten(0, 1) for part in normal.split(BATCH)])
    chosen = torch.cat(list(greedy_coreset(patches, round(coreset * len(patches)), 0)))
    detector.bank = patches[chosen]
    detector.fit_index()
    start = time.process_time()
    maps = torch.cat([detector.score_and_map({"image": part})["map"] for part in test.split(BATCH)])
    return maps, detector._smoothed(maps), (time.process_time() - start) / len(test)


def rows(root: Path, network: str, name: str) -> list[dict[str, object]]:
    """The rows of a category."""
    count, coreset = DATA[name]
    normal, shown = images_below(root / "mvtec" / name / "train"), images_below(root / "mvtec" / name / "test")
    shown = shown[:: max(1, len(shown) // 20)][:20]
    images, test, found = read(normal[:count]), read(shown), []
    whole = torch.empty(0)
    for tile, overlap in SETTINGS:
        maps, smooth, seconds = scored(network, (tile, overlap), images, test, coreset)
        whole = maps if tile is None else whole
        row: dict[str, object] = dict.fromkeys(HEAD, "-")
        row |= {"data": name, "tile": tile or "none", "overlap": overlap, "cpu_ms": round(1000 * seconds)}
        if tile is not None:
            begins = places(SIDE, tile, overlap, STRIDE)
            inner = {*begins[1:], *(one + tile for one, _ in pairwise(begins))}
            edges = sorted(inner)
            row |= {"tiles": len(begins) ** 2, "seam": f"{ratio(maps, edges):.3f}"}
            row |= {"whole": f"{ratio(whole, edges):.3f}"}
            row |= {"difference": f"{float((maps - whole).abs().mean() / whole.mean()):.4f}"}
        if name == "leather":
            pixels = PixelHistogram()
            pixels.add(smooth, masks(shown))
            metrics = pixels.metrics()
            row["pixel_auroc"] = "-" if metrics is None else f"{metrics.auroc:.4f}"
        print("| " + " | ".join(str(row[key]) for key in HEAD) + " |", flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    root, network, *file = sys.argv[1:]
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    table = [row for name in DATA for row in rows(Path(root), network, name)]
    if file:
        with Path(file[0]).open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, HEAD, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
