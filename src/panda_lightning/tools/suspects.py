"""``panda suspects --config conf/X.yaml``: which normal training images look least like the others.

They go into a table, to be looked at (`panda gallery suspects.jsonl`) and shortened by a person. What is left of it is
kept out of training by ``data.leave_out``.
"""

import csv
import json
import os
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import Namespace
from rich import box, get_console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from panda_lightning.arguments import Count, Share
from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.datamodules.outliers import near_copies
from panda_lightning.detectors import DN2
from panda_lightning.runtime.gathering import gather
from panda_lightning.runtime.whole import new_file, require_new
from panda_lightning.types import PandaError

HELP = "List normal training images that look least like the others, copies, and blank, dark or blurred ones."
SHOWN = 20  # rows that are printed
BLANK, DARK, BLURRED = 4.0, 24.0, 0.25  # spread and mean of grey values; sharpness as a share of the median


def arguments(parser: OneSentenceParser) -> None:
    """Accept the configuration files of ``lightning fit``, the data set's flags, and the network."""
    add = parser.add_argument
    add("-c", "--config", action="config", help="A configuration file, as for `lightning fit`; repeatable.")
    parser.add_subclass_arguments(AnomalyDataModule, "data", required=True)
    add("--backbone", type=str | None, default=None, help="As model.backbone, by default that of the configuration.")
    add("--k", type=Count, default=5, help="Neighbours: choose more than the number of bad images of one kind.")
    add("--accelerator", type=Literal["cpu", "cuda"], default="cpu", help="Where the network runs: cpu or cuda.")
    add("--share", type=Share, default=0.05, help="Share of the images to list, besides those with remarks or copies.")
    add(
        "-o",
        "--output",
        type=Path | None,
        default=None,
        help="The table; a .jsonl for the gallery is written next to it.",
    )
    for key in ("seed_everything", "trainer", "model", "ckpt_path"):  # in the same files
        add(f"--{key}", default=None, help=SUPPRESS)


def run(config: Namespace) -> int:
    """Write the table, and print its beginning."""
    name = type(config.data).__name__.lower()
    model: Any = config.model if isinstance(config.model, Mapping | Namespace) else {}
    backbone = config.backbone or (model.get("init_args") or {}).get("backbone") or "panda_tiny"
    output = config.output or Path(f"suspects-{name}.csv")
    if output.suffix != ".csv":
        raise PandaError(f"--output={output} is not a name for a CSV table: choose a name that ends in .csv.")
    require_new(output)  # rows may have been deleted from it by hand
    rows = suspects(config.data, backbone, config.k, config.accelerator)
    listed = [row for row in rows if row["p_value"] <= config.share or row["copies"] or row["remarks"]]
    write(listed, output)
    _print(rows, listed, config.data, backbone, output)
    return 0


def suspects(data: AnomalyDataModule, backbone: str, k: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The normal training images, the most suspicious first.

    Args:
        data: The data set.
        backbone: See DN2.
        k: Neighbours of the score: the sum of squared distances between normalised features, each image without itself.
        device: Where the network runs.

    Returns:
        For each path, score, p_value (the share of images, itself among them, that score as high), neighbours with
        their distances, copies (earlier training images and test images that show nearly the same), and remarks.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise PandaError(f"accelerator={device}, but torch finds no GPU here: choose cpu.")
    data.prepare_data()
    data.calibration_fraction = 0.0  # images that are held back can be odd, too
    detector = DN2(backbone, k=k, normalize=True)
    detector.load_networks()
    detector.to(device).eval()
    if data.interpolation is None:
        data.interpolation = detector.interpolation  # type: ignore[assignment]  # one of the two that there are
    images = data.normal_images
    if k >= len(images):
        raise PandaError(f"k={k} neighbours of an image need {k + 1} images or more, but there are {len(images)}.")
    loader, parts = data.normal_dataloader(), []
    with torch.inference_mode():
        for batch in track(loader, "Normal images", transient=True):
            features = detector.backbone(batch["image"].to(device)).float()
            parts.append((batch["index"].to(device), features, torch.from_numpy(_look(batch["image"].numpy()))))
        _, detector.bank, looks = gather(parts)
        detector.fit_index()
        score = detector.without_itself().cpu().double().numpy()
        distance, near = detector.index.search(detector.scoring_space(detector.bank), k + 1)
    shown: Any = loader.dataset
    paths, names = shown.images.paths(), data.names(shown.images)
    copies = _copies(data, shown.images, names)
    remarks = _remarks(looks.numpy())
    rows = []
    for i in np.argsort(-score, kind="stable").tolist():
        others = [(int(j), float(d)) for j, d in zip(near[i], distance[i], strict=True) if int(j) != i][:k]
        rows.append(
            {
                "path": paths[i],
                "score": float(score[i]),
                "p_value": float((score >= score[i]).mean()),
                "copies": copies.get(i, []),
                "remarks": remarks[i],
                "anomalous": None,
                "neighbours": [{"path": paths[j], "distance": d} for j, d in others],
                "unreadable": None,
            }
        )
    return rows


def _copies(data: AnomalyDataModule, images: Any, names: list[str]) -> dict[int, list[str]]:
    """For each image those of training and test that show nearly the same."""
    found: dict[int, list[str]] = {}
    rule = data.view.intensity
    for one, other, _ in near_copies(images, intensity=rule):
        found.setdefault(other, []).append(names[one])  # one of each pair may stay
    test = data.test_images
    for one, other, _ in near_copies(images, test, rule) if len(test) else ():
        found.setdefault(one, []).append(f"test: {data.names(test.take(np.array([other])))[0]}")
    return found


def _look(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Mean, spread and sharpness of the grey values of images (B, 3, H, W): (B, 3)."""
    grey = images.mean(axis=1)
    laplacian = (
        4 * grey[:, 1:-1, 1:-1] - grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    )
    spread = grey.std(axis=(1, 2))
    return np.stack([grey.mean(axis=(1, 2)), spread, laplacian.std(axis=(1, 2)) / np.maximum(spread, 1)], axis=1)


def _remarks(looks: npt.NDArray[np.float64]) -> list[str]:
    """What is wrong with each image to the eye, in a word; blurred is by comparison with the others."""
    mean, spread, sharpness = looks.T
    blank, dark = spread < BLANK, mean < DARK
    blurred = sharpness < BLURRED * np.median(sharpness)
    rules = [("blank", blank), ("dark", dark & ~blank), ("blurred", blurred & ~blank)]
    return [", ".join(word for word, holds in rules if holds[i]) for i in range(len(looks))]


def write(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the table, and the same for `panda gallery`."""
    with new_file(output) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "score", "p_value", "nearest", "distance", "copies", "remarks"))
        for row in rows:
            nearest = row["neighbours"][0]
            cells = (nearest["path"], nearest["distance"], "; ".join(row["copies"]), row["remarks"])
            table.writerow((row["path"], row["score"], row["p_value"], *cells))
    with new_file(output.with_suffix(".jsonl")) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _print(
    rows: list[dict[str, Any]], listed: list[dict[str, Any]], data: AnomalyDataModule, backbone: str, output: Path
) -> None:
    table = Table(title=escape(f"{type(data).__name__}: least like the others, by {backbone}"), box=box.SIMPLE)
    for heading in ("image", "score", "p", "copies", "remarks"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("score", "p") else "left")
    for row in rows[:SHOWN]:
        name = os.path.relpath(row["path"], data.root) if os.sep in row["path"] else row["path"]
        cells = (name, f"{row['score']:.4g}", f"{row['p_value']:.3g}", "; ".join(row["copies"]), row["remarks"])
        table.add_row(*map(escape, cells))
    console = get_console()
    console.print(table)
    odd = [f"{sum(word in row['remarks'] for row in rows)} {word}" for word in ("blank", "dark", "blurred")]
    copied = sum(bool(row["copies"]) for row in rows)
    lines = [
        f"{len(rows)} images: {', '.join(odd)}, {copied} with copies.",
        f"{len(listed)} are listed in {output}; look at them with: panda gallery {output.with_suffix('.jsonl')}",
        f"Remove the good images from the table: --data.leave_out={output} then leaves the others out of training.",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
