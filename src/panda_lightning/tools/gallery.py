"""``panda gallery predictions.jsonl``: scored images on one page, to look at in a browser."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from os import cpu_count
from pathlib import Path

import numpy as np
from jsonargparse import Namespace
from PIL import Image
from rich import get_console
from rich.progress import track

from panda_lightning.arguments import Count, Number, require
from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.datamodules.base import Rule
from panda_lightning.pictures.pixels import read_rgb
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import PandaError

HELP = "Show scored images on one HTML page: sorted by score, with maps, nearest normal images, filter and search."
PAGE = Path(__file__).with_suffix(".html")


def arguments(parser: OneSentenceParser) -> None:
    """Accept the table of `lightning predict`, and what to show of it."""
    add = parser.add_argument
    add("table", type=Path, help="A predictions.jsonl; the folder maps next to it is used if it exists.")
    add("-o", "--output", type=Path | None, default=None, help="The page; by default gallery.html next to the table.")
    add("--limit", type=Count, default=5000, help="Number of images to show, those with the highest scores.")
    add("--size", type=Count, default=128, help="Side of the pictures, in pixels.")
    add("--neighbours", type=Number, default=3, help="Nearest normal images to show with each image.")
    add("--intensity", type=str, default="auto", help="As data.intensity.")


def run(config: Namespace) -> int:
    """Write the page and say where."""
    output = config.output or config.table.with_name("gallery.html")
    require("intensity", config.intensity, Rule)
    if output.exists() and config.table.exists() and output.samefile(config.table):
        raise PandaError(f"--output={output} is the table itself: name another file.")
    count = gallery(config.table, output, config.limit, config.size, config.neighbours, config.intensity)
    get_console().print(f"Gallery of {count} images: {output}", soft_wrap=True, markup=False, highlight=False)
    return 0


def gallery(
    table: Path, output: Path, limit: int = 5000, size: int = 128, neighbours: int = 3, intensity: str = "auto"
) -> int:
    """Write a page that holds all it shows, and asks nothing of a network.

    Args:
        table: A predictions.jsonl.
        output: The page.
        limit: How many images, the highest scores first; those that cannot be read come last.
        size: Side of the pictures in pixels.
        neighbours: How many nearest normal images to show with each.
        intensity: See AnomalyDataModule.

    Returns:
        How many images it shows.

    Raises:
        PandaError: If the table cannot be read.
    """
    try:
        rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
        for row in rows:
            row |= {"path": str(row["path"]), "unreadable": row["unreadable"], "score": _finite(row["score"])}
        rows.sort(key=lambda row: -np.inf if row["score"] is None else row["score"], reverse=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PandaError(f"{table} is not a predictions.jsonl of `lightning predict` ({error}).") from error
    total, rows = len(rows), rows[:limit]
    for row in rows:
        row["neighbours"] = row.get("neighbours", [])[:neighbours]
        drawn = table.parent / Path(row.get("map") or "none").with_suffix(".png")  # beside the map's values
        row["map"] = str(drawn) if drawn.is_file() else None
    paths = {row["path"] for row in rows if not row["unreadable"]}
    paths |= {near["path"] for row in rows for near in row["neighbours"]} | {row["map"] for row in rows if row["map"]}
    shown = dict(_pictures(sorted(paths), size, intensity))
    if paths and not shown:
        raise PandaError(
            f"none of the pictures can be read, such as {min(paths)}: paths are as they were given to `predict`, "
            "so run this in the same folder."
        )
    content = json.dumps({"rows": rows, "pictures": shown, "total": total, "name": str(table)})
    page = PAGE.read_text("utf-8").replace("/*CONTENT*/", content.replace("<", "\\u003c"))
    with new_file(output) as part:
        part.write_text(page, "utf-8")
    return len(rows)


def _finite(score: float | None) -> float | None:
    """A score that JSON knows."""
    return score if score is not None and np.isfinite(score) else None


def _pictures(paths: list[str], size: int, intensity: str) -> Iterator[tuple[str, str]]:
    """Each picture as a JPEG in a data address; one that cannot be read is left out."""

    def picture(path: str) -> str:
        try:
            image = read_rgb(Path(path), intensity)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return ""
        image.thumbnail((size, size))
        file = BytesIO()
        image.save(file, format="JPEG", quality=72)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    with ThreadPoolExecutor(cpu_count()) as pool:
        found_all = track(pool.map(picture, paths), "Pictures", len(paths), transient=True)
        for path, found in zip(paths, found_all, strict=True):
            if found:
                yield path, found
