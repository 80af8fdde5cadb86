"""``panda table --config conf/cifar10.yaml --methods dn2,early,ewc --seeds 0,1``: all normal classes, in one table.

Runs go on where they stopped; what is there is not run again. The folder holds ``table.csv`` (a line a run)
and ``table.md`` beside the rows, logs and checkpoints.
"""

import csv
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import Namespace
from rich import get_console
from rich.progress import BarColumn, Progress, TextColumn
from scipy import stats

from panda_lightning.cli import OneSentenceParser
from panda_lightning.formulas import uncertainty
from panda_lightning.runtime.whole import new_file
from panda_lightning.tools.rows import Found, Row, Rows, machine, planned, spread
from panda_lightning.types import PandaError

HELP = "Run methods on all normal classes and seeds of a data set, and write one table with intervals."
PUBLISHED: dict[str, dict[str, list[dict[str, Any]]]] = yaml.safe_load(
    Path(__file__).with_name("published.yaml").read_text("utf-8")
)
COLUMNS = (
    "data", "normal_class", "method", "seed", "auroc", "low", "high", "reliable", "average_precision", "fpr_at_95_tpr",
    "auroc_at_0_epochs", "best_epoch_oracle", "epochs", "seconds", "version", "error",
)  # fmt: skip


def arguments(parser: OneSentenceParser) -> None:
    """Accept what to run, and where."""
    add = parser.add_argument
    add("--config", type=str, default="", help="Configuration files of `lightning`, with commas between.")
    add("--methods", type=str, default="dn2", help="Variants beside the first of them (dn2,early,ewc), or files.")
    add("--classes", type=str | None, default=None, help="Normal classes; by default all of the data set.")
    add("--seeds", type=str, default="0", help="Of runs: 0,1,2.")
    add("--words", type=str, default="", help="Further words of `lightning` for all runs: --words='--data.root data'.")
    add("--folder", type=Path | None, default=None, help="Where all goes; by default tables/ and the data set's name.")
    add("--shard", type=str | None, default=None, help="Run a part alone, i/n: for an array of jobs on one folder.")
    add("--again", type=bool, default=False, help="Run rows anew that failed before.")
    add("--merge", type=str, default="", help="Take the rows of other folders over, with commas between; run nothing.")


def run(config: Namespace) -> int:
    """Run what is missing, and write the table of what there is."""
    if config.merge:
        if config.folder is None:
            raise PandaError("--merge needs --folder, where the rows of the others go.")
        merge(_listed(config.merge), config.folder)
        return _written(Rows(config.folder), None)
    configs = _listed(config.config)
    if not configs:
        raise PandaError("--config is missing: name a configuration such as conf/digits.yaml.")
    seeds = [int(seed) if seed.isdecimal() else -1 for seed in _listed(config.seeds)]
    if min(seeds, default=-1) < 0:
        raise PandaError(f"--seeds={config.seeds} are not whole numbers with commas between, such as 0,1,2.")
    classes = None if config.classes is None else _listed(config.classes)
    plan = planned(configs, _listed(config.methods), classes, seeds, shlex.split(config.words))
    rows = Rows(config.folder or Path("tables") / plan[0].data.lower())
    for line in _made(rows, spread(plan, config.shard), config.again):
        get_console().print(line, soft_wrap=True, markup=False, highlight=False)
    return _written(rows, plan)


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _made(rows: Rows, plan: Sequence[Row], again: bool) -> Iterable[str]:
    """Run them with a bar for the whole; a line for each."""
    seconds: dict[str, list[float]] = defaultdict(list)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("{task.fields[end]}"))  # fmt: skip
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as progress:
        task = progress.add_task("Runs", total=len(plan), end="")
        for number, (row, found) in enumerate(rows.make(plan, again), 1):
            if found is not None:
                seconds[row.method].append(found.seconds)
                yield _line(rows, found)
            left = sum(np.median(seconds[later.method]) for later in plan[number:] if seconds[later.method])
            unknown = sorted({later.method for later in plan[number:]} - {m for m, times in seconds.items() if times})
            end = f"about {left / 60:.0f} min left" + (f" and {', '.join(unknown)}" if unknown else "")
            progress.update(task, completed=number, description=f"{row.normal}, {row.method}", end=end)


def _line(rows: Rows, found: Found) -> str:
    row = found.row
    head = f"{row.data}, {row.normal}, {row.method}, seed {row.seed}:"
    if found.error is not None:
        return f"{head} failed ({found.error})"
    kept = rows.scores(row)
    sure = uncertainty.interval(kept["score"], kept["label"])
    return f"{head} {sure.value:.4f} [{sure.low:.4f}, {sure.high:.4f}] in {found.seconds:.0f} s"


def merge(folders: Sequence[str], into: Path) -> None:
    """Copy the rows of other folders; of a row that is in several, the first stays.

    Raises:
        PandaError: If one has no rows.
    """
    (into / "rows").mkdir(parents=True, exist_ok=True)
    for folder in folders:
        paths = sorted((Path(folder) / "rows").glob("*.json"))
        if not paths:
            raise PandaError(f"{folder} has no rows: name the --folder of a `panda table`.")
        for path in paths:
            target = into / "rows" / path.name
            if not target.exists():
                if (scores := path.with_suffix(".npz")).exists():
                    shutil.copy2(scores, target.with_suffix(".npz"))
                with new_file(target) as part:
                    shutil.copy2(path, part)


def _written(rows: Rows, plan: Sequence[Row] | None) -> int:
    """Write the tables and say where; the status is 1 where a run of the plan failed."""
    wanted = None if plan is None else {row.name for row in plan}
    found = [one for one in rows.read() if wanted is None or one.row.name in wanted]
    if not found:
        raise PandaError(f"there are no rows in {rows.folder} yet.")
    lines = [_values(rows, one) for one in found]
    with new_file(rows.folder / "table.csv") as part, part.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
    text = markdown(rows, found, 0 if plan is None else len(plan) - len(found))
    with new_file(rows.folder / "table.md") as part:
        part.write_text(text, "utf-8")
    get_console().print(f"{text}\n{rows.folder / 'table.csv'}", soft_wrap=True, markup=False, highlight=False)
    return 1 if any(one.error for one in found) else 0


def _values(rows: Rows, found: Found) -> dict[str, Any]:
    """A line of table.csv."""
    row = found.row
    line: dict[str, Any] = {"data": row.data, "normal_class": row.normal, "method": row.method, "seed": row.seed}
    line |= {"seconds": round(found.seconds, 1), "version": found.version, "error": found.error}
    if found.error is not None:
        return line
    kept = rows.scores(row)
    score, label = kept["score"].astype(np.float64), kept["label"]
    sure = uncertainty.interval(score, label)
    line |= {"auroc": sure.value, "low": sure.low, "high": sure.high, "reliable": sure.reliable}
    line |= {"average_precision": uncertainty.average_precision(score, label)}
    line |= {"fpr_at_95_tpr": uncertainty.fpr_at_tpr(score, label), "epochs": found.curve[-1][0]}
    if found.curve[0][0] == 0:
        line["auroc_at_0_epochs"] = found.curve[0][1]
    if len(found.curve) > 1:
        line["best_epoch_oracle"] = max(auroc for _, auroc in found.curve)
    return line


def markdown(rows: Rows, found: Sequence[Found], missing: int) -> str:
    """The table for people: means with intervals beside published figures, classes, comparisons, failures."""
    good = [one for one in found if one.error is None]
    text = []
    for data in dict.fromkeys(one.row.data for one in found):
        some = [one for one in good if one.row.data == data]
        methods = list(dict.fromkeys(one.row.method for one in some))
        classes = list(dict.fromkeys(one.row.normal for one in some))
        scores = {m: _stacked(rows, [one for one in some if one.row.method == m]) for m in methods}
        text += [f"## {data}", "", *_summary(data, methods, some, scores), "", *_classes(methods, classes, some)]
        pairs = _pairs(methods, some, rows)
        text += ["", *pairs] if pairs else []
    bad = [f"- {one.row.data}, {one.row.normal}, {one.row.method}, seed {one.row.seed}: {one.error}" for one in found
           if one.error]  # fmt: skip
    text += ["", "Failed:", "", *bad] if bad else []
    text += ["", f"{missing} runs are not there yet."] if missing else []
    version = found[0].version
    text += ["", "AUROC in per cent. In brackets 95 % intervals over test images (DeLong, on the scale of logits; the "
             f"images are shared by classes and seeds). {version}; table written on {machine()}."]  # fmt: skip
    return "\n".join(text)


def _stacked(rows: Rows, found: Sequence[Found]) -> tuple[Any, Any]:
    """Scores and labels (K, N) of runs."""
    kept = [rows.scores(one.row) for one in found]
    return np.stack([k["score"].astype(np.float64) for k in kept]), np.stack([k["label"] for k in kept])


def _summary(data: str, methods: Sequence[str], some: Sequence[Found], scores: dict[str, Any]) -> list[str]:
    lines = ["| method | runs | mean | over seeds, sd | published | difference |", "|---|---|---|---|---|---|"]
    for method in methods:
        runs = [one for one in some if one.row.method == method]
        sure = uncertainty.interval(*scores[method])
        by_seed: dict[int, list[float]] = defaultdict(list)
        for one in runs:
            by_seed[one.row.seed].append(one.auroc or np.nan)
        means = [float(np.mean(values)) for values in by_seed.values()]
        spread = f"{100 * np.std(means, ddof=1):.2f}" if len(means) > 1 else ""
        known = PUBLISHED.get(data, {}).get(method, [])
        values = ", ".join(f"{one['value']:g}" for one in known)
        gaps = ", ".join(f"{100 * sure.value - one['value']:+.2f}" for one in known)
        unsure = "" if sure.reliable else " (too few images for a reliable interval)"
        cell = f"{100 * sure.value:.2f} [{100 * sure.low:.2f}, {100 * sure.high:.2f}]{unsure}"
        lines.append(f"| {method} | {len(runs)} | {cell} | {spread} | {values} | {gaps} |")
    others = [(m, v) for m, v in PUBLISHED.get(data, {}).items() if m not in methods]
    lines += [f"| {m}, published | | | | {', '.join(format(one['value'], 'g') for one in v)} | |" for m, v in others]
    return lines


def _classes(methods: Sequence[str], classes: Sequence[str], some: Sequence[Found]) -> list[str]:
    lines = ["| normal class | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for normal in classes:
        cells = []
        for method in methods:
            values = [one.auroc for one in some if (one.row.normal, one.row.method) == (normal, method)]
            cells.append(f"{100 * float(np.mean([v for v in values if v is not None])):.2f}" if values else "not run")
        lines.append(f"| {normal} | " + " | ".join(cells) + " |")
    return lines


def _pairs(methods: Sequence[str], some: Sequence[Found], rows: Rows) -> list[str]:
    """Each method against each, on the classes and seeds that both have: paired by image, Holm's correction."""
    compared = []
    for one, other in combinations(methods, 2):
        own = [{(f.row.normal, f.row.seed): f for f in some if f.row.method == m} for m in (one, other)]
        both = [key for key in own[0] if key in own[1]]
        if both:
            (first, labels), (second, _) = (_stacked(rows, [part[key] for key in both]) for part in own)
            compared.append((one, other, uncertainty.difference(first, second, labels)))
    if not compared:
        return []
    p = [2 * float(stats.norm.sf(abs(d.value) / d.error)) if d.error else 1.0 for *_, d in compared]
    lines = ["| pair | difference of means | p (Holm) |", "|---|---|---|"]
    for (one, other, d), adjusted in zip(compared, uncertainty.holm(np.array(p)), strict=True):
        cell = f"{100 * d.value:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
        lines.append(f"| {one} - {other} | {cell} | {adjusted:.2g} |")
    return lines
