"""Draw AUROC against compactness: python experiments/by_compactness.py FOLDER writes FOLDER/by_compactness.png.

FOLDER is that of a `panda table` with `Early` of raw features at several limits of the gradient and numbers of images.
What its runs logged at each validation is kept in FOLDER/compactness.csv, from which the picture is drawn again where
the runs are gone. Compactness is the mean over the epoch before, as a share of that of the first epoch.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

HEAD = ("class", "images", "method", "epochs", "share", "auroc")
COLOURS = {"": "#0072B2", "clip 1e-2": "#009E73", "clip 4e-2": "#56B4E9", "clip 1e-1": "#E69F00"}  # Okabe and Ito


def read(folder: Path) -> list[tuple[str, ...]]:
    """Lines of compactness.csv, from the runs of a folder."""
    lines: list[tuple[str, ...]] = []
    for file in sorted((folder / "rows").glob("*.json")):
        row = json.loads(file.read_text("utf-8"))["row"]
        logs = sorted((folder / "runs" / file.stem).glob("version_*/metrics.csv"))
        if row["method"].endswith("normalised") or not row["method"].startswith("Early"):
            continue
        first, last, seen = None, None, set()
        for line in (line for log in logs for line in csv.DictReader(log.read_text("utf-8").splitlines())):
            if line.get("val/auroc") and line["epochs_trained"] not in seen:
                seen.add(line["epochs_trained"])
                share = 1.0 if first is None or last is None else last / first
                name = row["normal"], str(row["shots"]), row["method"].removeprefix("Early").removeprefix(", ")
                lines.append((*name, line["epochs_trained"], f"{share:.5f}", line["val/auroc"]))
            if line.get("train/compactness"):
                last = float(line["train/compactness"])
                first = first or last
    return lines


def draw(folder: Path) -> None:
    """Draw the picture of a folder."""
    with (folder / "compactness.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    curves = defaultdict(list)
    for line in lines:
        curves[line["class"], line["images"], line["method"]].append((float(line["share"]), float(line["auroc"])))
    classes = sorted({normal for normal, *_ in curves})
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, normal in zip(figure.subplots(1, len(classes), squeeze=False)[0], classes, strict=True):
        for (kind, images, method), points in curves.items():
            if kind == normal:
                steps = method.removeprefix("steps").removeprefix(", ")
                style = "-" if method.startswith("steps") else ":"
                marker = "o" if images == "100" else "s"
                label = f"{steps or 'clip 1e-3'}, {images} images" if style == "-" else None
                axes.plot(*zip(*points, strict=True), style, marker=marker, ms=3, lw=1, c=COLOURS[steps], label=label)
        axes.axvline(1 / 3, color="grey", lw=0.8)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_title(f"{normal}, raw features", loc="left")
        axes.set_xlabel("compactness of the training images, share of its start")
        axes.set_ylabel("AUROC")
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    figure.savefig(folder / "by_compactness.png", dpi=110)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if (folder / "runs").is_dir():
        with (folder / "compactness.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *read(folder)])
    draw(folder)
