"""All categories of MVTec AD, or those that are there, by one method: a table beside the published figures.

    python experiments/mvtec.py data/mvtec spade|patchcore|dn2 [words of the command line]

One process for all: the last column shows that its memory does not grow. Published, in %: DN2 image level by
category, and means of 15 categories with WideResNet-50-2 for SPADE (re-implementations), the segmentation of the PANDA
paper, PatchCore, and PaDiM (which is not here).
"""

import gc
import sys
import tempfile
import time
from pathlib import Path

from panda_lightning.cli import main
from panda_lightning.datamodules.mvtec import CATEGORIES

DN2 = (97.9, 86.1, 87.5, 88.2, 54.0, 96.9, 97.9, 80.9, 79.0, 66.9, 98.7, 84.4, 91.1, 94.7, 93.2)
MEANS = {  # image AUROC / pixel AUROC / PRO
    "DN2": "86.5 / - / -",
    "SPADE": "85.4 / 96.4 / -",
    "PANDA": "- / 96.2 / 91.7",
    "PatchCore": "99.2 / 98.1 / 94.4",
    "PaDiM": "95.0 / 97.9 / -",
}
HEAD = ("category", "image AUROC", "pixel AUROC", "PRO", "published DN2, image", "seconds", "MiB after it")
KEYS = ("auroc", "pixel_auroc", "pro")


def resident() -> float:
    """MiB of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


def run(root: str, category: str, variant: str, words: list[str], folder: str) -> dict[str, float]:
    """Metrics of one category."""
    import csv

    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}"]
    name = f"--trainer.logger.name={category}"
    configs = ["--config=conf/mvtec.yaml", f"--config=conf/variants/{variant}.yaml"]
    main(["test", *configs, f"--data.root={root}", f"--data.category={category}", *quiet, name, *words])
    with (Path(folder) / category / "version_0/metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    return {key: float(row[f"test/{key}"]) for key in KEYS if f"test/{key}" in row}


if __name__ == "__main__":
    root, variant, *words = sys.argv[1:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for category, published in zip(CATEGORIES, DN2, strict=True):
            if not (Path(root) / category / "test").is_dir():
                continue
            start = time.perf_counter()
            found = run(root, category, variant, words, folder)
            gc.collect()
            rows.append((category, found, published, time.perf_counter() - start, resident()))
    print(f"\n| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    for category, found, published, seconds, memory in rows:
        cells = [f"{100 * found[key]:.1f}" if key in found else "-" for key in KEYS]
        print(f"| {category} | {' | '.join(cells)} | {published} | {seconds:.0f} | {memory:.0f} |")
    means = []
    for key in KEYS:
        values = [found[key] for _, found, *_ in rows if key in found]
        means.append(f"{100 * sum(values) / len(values):.1f} ({len(values)})" if values else "-")
    print(f"| mean (of) | {' | '.join(means)} | 86.5 | | |")
    print(
        "\nPublished means, image / pixel / PRO: " + ", ".join(f"{name} {figures}" for name, figures in MEANS.items())
    )
