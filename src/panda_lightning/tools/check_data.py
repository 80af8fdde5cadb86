"""``panda check-data --config conf/X.yaml``: look at the images before a night is spent on them.

It reads the same files as ``lightning fit`` and uses their ``data`` part. All images of both splits are looked at, also
those that the protocol leaves out.
"""

import hashlib
import os
import warnings
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from jsonargparse import Namespace
from PIL import Image
from rich import box, get_console
from rich.markup import escape
from rich.table import Table

from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.datamodules.base import Split
from panda_lightning.pictures.images import Images
from panda_lightning.pictures.looking import Facts, looks, remarks
from panda_lightning.pictures.shapes import shapes
from panda_lightning.runtime.sizes import in_words
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import PandaError

HELP = "Check a data set for problems, count its images, and draw some of them."
SPLITS: tuple[Split, Split] = ("train", "test")
LISTED = 50  # defects of a kind that are printed
SHOWN, COLUMNS, TILE = 32, 8, 160  # of the contact sheet: images of a kind, images in a row, pixels

T = TypeVar("T")


def arguments(parser: OneSentenceParser) -> None:
    """Accept the configuration files of ``lightning fit``, the data set's flags, and where the picture goes."""
    parser.add_argument(
        "-c", "--config", action="config", help="A configuration file, as for `lightning fit`; repeatable."
    )
    parser.add_subclass_arguments(AnomalyDataModule, "data", required=True)
    parser.add_argument("-o", "--output", type=str | None, default=None, help="The contact sheet's PNG file.")
    for key in ("seed_everything", "trainer", "model", "ckpt_path"):  # in the same files, and not for us
        parser.add_argument(f"--{key}", default=None, help=SUPPRESS)


def run(config: Namespace) -> int:
    """Print what there is and what is wrong: 0 without defects, else 1."""
    name = type(config.data).__name__.lower()
    return 1 if check(config.data, Path(config.output or f"check-data-{name}.png")) else 0


@dataclass(frozen=True)
class Survey:
    """One split: its images; a name, the facts and the content's SHA-256 of each; problems, and mere notes."""

    split: Split
    images: Images
    names: list[str]
    facts: list[Facts]
    digests: list[bytes]
    problems: list[str]
    notes: list[str]

    @cached_property
    def readable(self) -> npt.NDArray[np.bool_]:
        """(N,): which images can be read."""
        return np.array([not fact.unreadable for fact in self.facts], dtype=np.bool_)

    @cached_property
    def first(self) -> dict[bytes, int]:
        """The first readable image of each content."""
        return {digest: i for i, digest in reversed(list(enumerate(self.digests))) if self.readable[i]}


def check(data: AnomalyDataModule, sheet: Path) -> list[str]:
    """Print what there is and what is wrong with it, and draw a contact sheet.

    Args:
        data: The data set; its files are fetched if it knows how.
        sheet: The picture's file.

    Returns:
        The defects, a sentence each.
    """
    refusals: dict[str, None] = {}  # in order, each once

    def attempt(what: Callable[[], T]) -> T | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # problems are listed below
                return what()
        except PandaError as error:
            refusals[str(error)] = None
            return None

    attempt(data.prepare_data)
    fetched = not refusals
    read = {split: attempt(lambda split=split: data.read(split)) for split in SPLITS}  # type: ignore[misc]
    if not fetched:
        refusals = dict(list(refusals.items())[:1])  # the others follow from it
    surveys = {split: _survey(data, split, images) for split, images in read.items() if images is not None}
    number = attempt(data.class_number) if data.classes else None
    used: dict[Split, Images] = {}
    if number is not None:
        for split in surveys:
            images = attempt(lambda split=split: data.normal_images if split == "train" else data.test_images)  # type: ignore[misc]
            if images is not None:
                used[split] = images
        if len(used) == 2:
            attempt(lambda: data.setup("fit"))

    for split, images in used.items():  # masks that lack are known only where it is known what is anomalous
        surveys[split].problems.extend(p for p in images.problems if p not in surveys[split].problems)
    if "test" in used and not data.is_anomalous(used["test"].targets).any():
        surveys["test"].notes.append("there are no anomalous images, so there is no AUROC.")
    copies = _copies(surveys)
    defects = {
        "refusals": list(refusals),
        "empty classes": [] if number is None else _empty_classes(data, surveys, list(used)),
        "problems": [f"{s.split}: {problem}" for s in surveys.values() for problem in s.problems],
        "unreadable files": [
            f"{name} cannot be read: {fact.unreadable}."
            for s in surveys.values()
            for name, fact in zip(s.names, s.facts, strict=True)
            if fact.unreadable
        ],
        "copies": [f"test image {test} is a copy of training image {train}." for test, train in copies],
    }

    console = get_console()
    if surveys:
        console.print(_classes_table(data, surveys, number))
        console.print(_files_table(data, surveys, used, number))
        for survey in surveys.values():
            for note in survey.notes:
                console.print(f"{survey.split}: {note}", soft_wrap=True, markup=False, highlight=False)
    if len(used) == 2:
        text = data.manifest()
        rule = "the split follows our own rule" if data.own_split else "the split is the data set's own"
        lines = text.count("\n") - 1
        path = sheet.with_suffix(".manifest.csv")
        with new_file(path) as part:
            part.write_text(text, "utf-8")
        console.print(f"Manifest: {escape(str(path))}, {lines} images, {rule}", highlight=False, soft_wrap=True)
        console.print(f"  sha256 {hashlib.sha256(text.encode()).hexdigest()}", highlight=False)
    if number is not None and _draw(sheet, data, surveys):
        console.print(f"Contact sheet: {escape(str(sheet))}", soft_wrap=True)
    _print_defects(defects)
    return [sentence for sentences in defects.values() for sentence in sentences]


# ---- looking -----------------------------------------------------------------------------------------------------


def _survey(data: AnomalyDataModule, split: Split, images: Images) -> Survey:
    names = data.names(images) if len(images) and isinstance(images.sources[0], Path) else _rows(len(images))
    facts = [
        seen.facts for seen in looks(images.sources, images.masks, data.view, f"Checking {split} images", extremes=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, images.sources))
    problems, notes = remarks(images.sources, images.masks, facts, data.view)
    return Survey(split, images, names, facts, digests, [*images.problems, *problems], [*images.notes, *notes])


def _rows(count: int) -> list[str]:
    return [f"row {i}" for i in range(count)]


def _digest(source: Path | npt.NDArray[np.uint8]) -> bytes:
    content = source.tobytes() if isinstance(source, np.ndarray) else source.read_bytes() if source.is_file() else b""
    return hashlib.sha256(content).digest()


def _copies(surveys: dict[Split, Survey]) -> list[tuple[str, str]]:
    """Names of test and training image with the same content."""
    if len(surveys) < 2:
        return []
    train, test = (surveys[split] for split in SPLITS)
    pairs = zip(test.names, (train.first.get(digest) for digest in test.digests), strict=True)
    return [(name, train.names[row]) for name, row in pairs if row is not None]


def _empty_classes(data: AnomalyDataModule, surveys: dict[Split, Survey], used: list[Split]) -> list[str]:
    """Training needs every normal class, the test every class; where all of them lack, the data set refuses itself."""
    sentences = []
    for split in used:
        count = np.bincount(surveys[split].images.targets, minlength=len(data.classes))
        anomalous = data.is_anomalous(np.arange(len(data.classes)))
        needed = ~anomalous if split == "train" else np.ones_like(anomalous)
        if split == "test":
            needed &= np.array([count[anomalous == kind].any() for kind in anomalous])
        sentences += [f"class {data.classes[i]} has no {split} images." for i in np.flatnonzero(needed & (count == 0))]
    return sentences


# ---- printing ----------------------------------------------------------------------------------------------------


def _classes_table(data: AnomalyDataModule, surveys: dict[Split, Survey], number: int | None) -> Table:
    chosen = "" if number is None else f", class {data.classes[number]} with protocol {data.problem['protocol']}"
    table = Table(
        title=escape(f"{type(data).__name__}{chosen}"), box=box.SIMPLE, show_footer=True, title_justify="left"
    )
    counts = {split: np.bincount(s.images.targets, minlength=len(data.classes)) for split, s in surveys.items()}
    roles = ["?"] * len(data.classes)
    if number is not None:
        roles = ["anomalous" if a else "normal" for a in data.is_anomalous(np.arange(len(data.classes)))]
    table.add_column("class", "total", overflow="fold")
    table.add_column("is")
    for split, count in counts.items():
        table.add_column(split, str(count.sum()), justify="right")
        if split == "train":
            table.add_column("")
        else:
            table.add_column("of test", justify="right")
    for i, name in enumerate(data.classes):
        row = [escape(name), roles[i]]
        for split, count in counts.items():
            row.append(str(count[i]))
            if split == "train":
                row.append("" if number is None or not count[i] else "used" if roles[i] == "normal" else "not used")
            else:
                row.append(f"{count[i] / count.sum():.1%}")
        table.add_row(*row, style="bold" if roles[i] == "normal" else None)
    return table


def _files_table(
    data: AnomalyDataModule, surveys: dict[Split, Survey], used: dict[Split, Images], number: int | None
) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("images")
    for split in surveys:
        table.add_column(split, overflow="fold")

    def add(heading: str, value: Callable[[Survey], str]) -> None:
        table.add_row(heading, *(value(s) for s in surveys.values()))

    def share(survey: Survey, kind: bool) -> str:
        rows = data.is_anomalous(survey.images.targets) == kind
        return f"{rows.sum()} ({rows.mean():.1%})" if len(rows) else "0"

    def masked(survey: Survey) -> str:
        masks, anomalous = survey.images.masks, np.flatnonzero(data.is_anomalous(survey.images.targets))
        return f"{sum(masks[int(i)] is not None for i in anomalous)} of {len(anomalous)} anomalous" if masks else "none"

    if number is not None:
        add("normal", lambda s: share(s, False))
        add("anomalous", lambda s: share(s, True))
        add("used by the protocol", lambda s: str(len(used[s.split])) if s.split in used else "none")
    add("width x height", _sizes)
    add("values", _values)
    add("turned by EXIF", lambda s: str(sum(f.turned for f in s.facts)))
    add("modes", lambda s: ", ".join(f"{m} {n}" for m, n in Counter(f.mode for f in s.facts if f.mode).most_common()))
    add("unreadable", lambda s: str((~s.readable).sum()))
    add("copies within the split", lambda s: str(s.readable.sum() - len(s.first)))
    if number is not None:
        add("masks", masked)
    add("on disk", lambda s: in_words(_disk(s)) + (" as an array" if isinstance(s.images.sources, np.ndarray) else ""))
    if used:
        heading = f"decoded at {data.view.pixels}, limit {data.memory_gb:g} GiB"
        add(heading, lambda s: _decoded(data, used[s.split]) if s.split in used else "")
    return table


def _sizes(survey: Survey) -> str:
    sizes = sorted((f.size for f in survey.facts if not f.unreadable), key=lambda size: (size[0] * size[1], size))
    if not sizes:
        return ""
    three = [f"{width} x {height}" for width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    return three[0] if sizes[0] == sizes[-1] else f"{three[0]} to {three[2]}\nmedian {three[1]}"


def _values(survey: Survey) -> str:
    """The range of the files' values by mode, which tells what ``intensity`` they need."""
    ranges: dict[str, tuple[float, float]] = {}
    for fact in survey.facts:
        if fact.extremes is not None:
            low, high = ranges.get(fact.mode, fact.extremes)
            ranges[fact.mode] = (min(low, fact.extremes[0]), max(high, fact.extremes[1]))
    return "\n".join(f"{mode} {low:g} to {high:g}" for mode, (low, high) in ranges.items())


def _disk(survey: Survey) -> int:
    if isinstance(survey.images.sources, np.ndarray):
        return survey.images.sources.nbytes
    return sum(path.stat().st_size for path in survey.images.sources if path.exists())


def _decoded(data: AnomalyDataModule, images: Images) -> str:
    size = 3 * int(shapes(images.sources, data.view).prod(axis=1).sum())
    fits = size <= data.memory_gb * 2**30
    return f"{in_words(size)} {'in memory' if fits else 'from disk'}"


def _print_defects(defects: dict[str, list[str]]) -> None:
    console, count = get_console(), sum(map(len, defects.values()))
    if not count:
        console.print("No defects.", style="bold green")
        return
    console.print(f"{count} defect{'s' if count > 1 else ''}:", style="bold red", highlight=False)
    for kind, sentences in defects.items():
        for sentence in sentences[:LISTED]:
            console.print(f"- {sentence}", soft_wrap=True, markup=False, highlight=False)
        if len(sentences) > LISTED:
            console.print(f"- and {len(sentences) - LISTED} more {kind}", highlight=False)


# ---- drawing -----------------------------------------------------------------------------------------------------


def _draw(path: Path, data: AnomalyDataModule, surveys: dict[Split, Survey]) -> bool:
    """Draw normal training images and anomalous test images as training sees them; False where there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = []
    for survey in surveys.values():
        kind = survey.split == "test"
        rows = np.flatnonzero(survey.readable & (data.is_anomalous(survey.images.targets) == kind))
        if len(rows):
            few = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(np.int64)
            title = f"{'Anomalous test' if kind else 'Normal training'} images, {len(few)} of {len(rows)}"
            parts.append((title, survey, rows[few]))
    if not parts:
        return False
    heights = [-(-len(rows) // COLUMNS) for _, _, rows in parts]
    figure = Figure(figsize=(11, sum(1.62 * h + 0.5 for h in heights) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    many = figure.subplots(len(parts), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (title, survey, rows), height in zip(many, parts, heights, strict=True):
        _draw_part(axes, data, survey, rows, height)
        axes.set_title(title, loc="left", fontsize=12)
    view = data.view
    how = f"crop {view.crop}" + (f", resize {view.resize}" if view.crop == "center" else "")
    figure.suptitle(f"{type(data).__name__} as training sees it: {view.pixels}, {how}", fontsize=12, x=0.5)
    with new_file(path) as part:
        figure.savefig(part, dpi=110, format="png")
    return True


def _draw_part(axes: Any, data: AnomalyDataModule, survey: Survey, rows: npt.NDArray[np.int64], height: int) -> None:
    view = data.view
    for place, row in enumerate(rows):
        image = Image.fromarray(np.ascontiguousarray(view(survey.images.sources[row]).transpose(1, 2, 0)))
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        x, y = place % COLUMNS, place // COLUMNS * 1.2
        wide, high = (side / max(image.size) for side in image.size)  # of the cell
        left, top = x + 0.5 - 0.47 * wide, y + 0.47 - 0.47 * high
        extent = (left, left + 0.94 * wide, top + 0.94 * high, top)
        axes.imshow(image, extent=extent, interpolation="antialiased")
        name = Path(survey.names[row]).stem
        label = f"{_short(data.classes[survey.images.targets[row]])}\n{_short(name)}"
        axes.text(x + 0.5, y + 0.96, label, ha="center", va="top", fontsize=6.5, parse_math=False)
    axes.set(xlim=(0, COLUMNS), ylim=(height * 1.2, 0), aspect="equal")
    axes.axis("off")


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"
