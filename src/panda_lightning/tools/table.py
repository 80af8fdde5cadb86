"""``panda table --config conf/cifar10.yaml --methods dn2,early,ewc --seeds 0,1``: all normal classes, in one table.

Runs go on where they stopped; what is there is not run again. The folder holds ``table.csv`` (a line a run),
``table.md``, ``table.tex`` and ``table.html`` beside the rows, logs and checkpoints.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from inspect import isabstract
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from panda_lightning.arguments import subclasses
from panda_lightning.cli import OneSentenceParser
from panda_lightning.formulas import uncertainty
from panda_lightning.runtime.whole import new_file
from panda_lightning.tools import formats
from panda_lightning.tools.plan import Row, planned, spread
from panda_lightning.tools.rows import Found, Rows, machine
from panda_lightning.tools.summary import Summary, summary
from panda_lightning.tools.tracked import log_table
from panda_lightning.types import PandaError

HELP = "Run methods on all normal classes and seeds of a data set, and write one table with intervals."
PACKAGES = {"TensorBoardLogger": ("tensorboard", "tensorboardX"), "MLFlowLogger": ("mlflow",),
            "CometLogger": ("comet_ml",), "NeptuneLogger": ("neptune",)}  # fmt: skip
Listed = str | int | list[str | int]


def arguments(parser: OneSentenceParser) -> None:
    """Accept what to run, and where."""
    add = parser.add_argument
    add("--study", action="config", help="A YAML file with any of the options below; those after it count.")
    add("--config", type=Listed, default="", help="Configuration files of `lightning`, with commas between.")
    add("--methods", type=Listed | dict[str, str], default="dn2",
        help="Variants beside the first of them (dn2,early,ewc) or files, each with further words of its own; in a "
        "study also a name for each: {normalised: dn2 --model.normalize=true}.")  # fmt: skip
    add("--classes", type=Listed | None, default=None, help="Normal classes; by default all of the data set.")
    add("--seeds", type=Listed, default="0", help="Of runs: 0,1,2.")
    add(
        "--shots",
        type=Listed | None,
        default=None,
        help="Train on so few images, drawn by seed: 1,4,16.",
    )
    add("--words", type=str, default="", help="Further words of `lightning` for all: --words='--data.root data'.")
    add("--folder", type=Path | None, default=None, help="Where all goes; by default below tables/.")
    add("--loggers", type=Listed, default="", help="Beside CSV: AutoWandbLogger, TensorBoardLogger, MLFlowLogger.")
    add("--shard", type=str | None, default=None, help="Run a part alone, i/n: for an array of jobs on one folder.")
    add("--again", type=bool, default=False, help="Run rows anew that failed before.")
    add("--run", type=bool, default=True, help="False writes the table of what is there, and runs nothing.")
    add(
        "--merge",
        type=Listed,
        default="",
        help="Take the rows of other folders over, with commas between; run nothing.",
    )


def run(config: Namespace) -> int:
    """Run what is missing, and write the table of what there is."""
    if config.merge:
        if config.folder is None:
            raise PandaError("--merge needs --folder, where the rows of the others go.")
        merge(_listed(config.merge), config.folder)
        return _written(Rows(config.folder), None, config)
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 or "LOCAL_RANK" in os.environ:
        raise PandaError(
            "a table is one process, which starts others for --trainer.devices: leave torchrun or srun out."
        )
    plan = plan_of(config)
    rows = Rows(config.folder or Path("tables") / plan[0].data.lower(), _loggers(config.loggers))
    if config.run:
        _make(rows, spread(plan, config.shard), config.again)
    return _written(rows, plan, config)


def plan_of(config: Namespace) -> list[Row]:
    """The rows that the options ask for."""
    configs = _listed(config.config)
    if not configs:
        raise PandaError("--config is missing: name a configuration such as conf/digits.yaml.")
    classes = None if config.classes is None else _listed(config.classes)
    shots = [None] if config.shots is None else _numbers("shots", config.shots, 1)
    words = shlex.split(config.words)
    return planned(configs, _methods(config.methods), classes, _numbers("seeds", config.seeds, 0), words, shots)


def _listed(given: Any) -> list[str]:
    parts = given if isinstance(given, list) else str(given).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _loggers(given: Any) -> list[str]:
    """Classes of loggers that can work here."""
    named = _listed(given)
    known = sorted(cls.__name__ for cls in subclasses(Logger) if not isabstract(cls))
    for name in named:
        if name not in known:
            raise PandaError(f"--loggers={name} is no logger: choose from {', '.join(known)}.")
        if name in PACKAGES and not any(map(find_spec, PACKAGES[name])):
            package = PACKAGES[name][0]
            raise PandaError(f"{name} needs the package {package}: `pip install {package}`, or leave it out.")
    return named


def _numbers(name: str, given: Any, least: int) -> list[int]:
    found = [int(word) if word.isdecimal() else -1 for word in _listed(given)]
    if min(found, default=-1) < least:
        example = "0,1,2" if not least else "1,4,16"
        raise PandaError(
            f"--{name}={given} are not whole numbers from {least} on with commas between, such as {example}."
        )
    return found


def _methods(given: Any) -> dict[str, str]:
    """What the table calls methods, and their variants with words."""
    if isinstance(given, dict):
        return {name: str(meant) for name, meant in given.items()}
    found: dict[str, str] = {}
    for method in _listed(given):
        variant, *own = shlex.split(method)
        name = " ".join([Path(variant).stem if variant.endswith((".yaml", ".yml")) else variant, *own])
        if name in found:
            raise PandaError(f"the method {name} is named twice: give it another name, or its file.")
        found[name] = method
    return found


# ---- progress --------------------------------------------------------------------------------------------------------


class Expected:
    """How long rows take, by what rows of their kind took on this machine.

    A kind is a method with its shots and seed: within a class, the first method that uses a network pays for the frozen
    layers of that class's images, and so do the same rows of other classes. What is done with test images is not done
    again.
    """

    def __init__(self, known: Sequence[Found]) -> None:
        self.known = [found for found in known if found.error is None and machine() in found.made]

    def seconds(self, row: Row) -> float | None:
        """Of one row; None where no such method has run yet."""
        same = [one for one in self.known if one.row.column == row.column]
        whole = [one.seconds - self._shared(one, "test") for one in same if one.row.seed == row.seed]
        bare = [one.seconds - self._shared(one, "") for one in same]
        values = whole or bare
        return max(0.0, float(np.median(values))) if values else None

    @staticmethod
    def _shared(one: Found, what: str) -> float:
        return sum(work.seconds for work in one.work if what in work.what)

    def left(self, rows: Sequence[Row]) -> str:
        """How long they all take, in words."""
        times = {row.name: self.seconds(row) for row in rows}
        unknown = list(dict.fromkeys(row.column for row in rows if times[row.name] is None))
        known = sum(seconds for seconds in times.values() if seconds is not None)
        end = time.strftime("%H:%M:%S", time.localtime(time.time() + known))
        more = f", and what takes {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}" if unknown else ""
        return f"about {_time(known)} left, until {end}{more}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _make(rows: Rows, plan: Sequence[Row], again: bool) -> None:
    """Run them with a bar for the whole, and below it the run of the moment; a line for each."""
    console = Console(file=sys.stdout)  # runs have theirs redirected
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[end]}"))  # fmt: skip
    there = {row.name for row in plan if rows.path(row).is_file()}
    expected = Expected(rows.read())
    options: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, console=console, disable=not console.is_terminal, **options) as progress:
        whole = progress.add_task("All runs", total=len(plan), end="")
        single = progress.add_task("", total=1, end="")
        made = rows.make(plan, again)
        for number, row in enumerate(plan, 1):
            own = expected.seconds(row)
            progress.reset(single, description=f"{row.normal}, {row.column}, seed {row.seed}", total=1)
            progress.update(single, end="" if own is None else f"about {_time(own)} in all")
            found = next(made)[1]
            expected.known += [found] if found is not None and found.error is None else []
            left = expected.left([later for later in plan[number:] if later.name not in there])
            progress.update(whole, completed=number, end=left)
            if found is not None:
                more = f"; {left}" if number < len(plan) else ""
                console.print(f"{_line(rows, found)}{more}", soft_wrap=True, markup=False, highlight=False)


def _line(rows: Rows, found: Found) -> str:
    row = found.row
    head = f"{row.data}, {row.normal}, {row.column}, seed {row.seed}:"
    if found.error is not None:
        return f"{head} failed ({found.error})"
    kept = rows.scores(row)
    sure = uncertainty.interval(kept["score"], kept["label"])
    passed = sum(work.images for work in found.work if work.verb.startswith("passed"))
    worked = f", {passed} images through frozen layers" if passed else ""
    return f"{head} {sure.value:.4f} [{sure.low:.4f}, {sure.high:.4f}] in {found.seconds:.1f} s{worked}"


# ---- outputs ---------------------------------------------------------------------------------------------------------


def merge(folders: Sequence[str], into: Path) -> None:
    """Copy the rows of other folders; of a row that is in several, the first that did not fail stays.

    Raises:
        PandaError: If one has no rows.
    """
    target = Rows(into)
    failed = {one.row.name for one in target.read() if one.error}
    for folder in folders:
        source = Rows(Path(folder))
        found = source.read()
        if not found:
            raise PandaError(f"{folder} has no rows: name the --folder of a `panda table`.")
        for one in found:
            name, path = one.row.name, target.path(one.row)
            if path.exists() and (name not in failed or one.error):
                continue
            for part in (f"hardest/{name}.npz", f"rows/{name}.npz", f"rows/{name}.json"):  # the row itself last
                if (source.folder / part).is_file():
                    with new_file(into / part) as new:
                        shutil.copyfile(source.folder / part, new)
            failed = failed | {name} if one.error else failed - {name}


def _written(rows: Rows, plan: Sequence[Row] | None, config: Namespace) -> int:
    """Write the tables and say where; the status is 1 where a run of the plan failed."""
    wanted = None if plan is None else {row.name for row in plan}
    found = [one for one in rows.read() if wanted is None or one.row.name in wanted]
    if not found and plan is None:
        raise PandaError(f"there are no rows in {rows.folder} yet.")
    told = summarised(rows, found, plan, config)
    table = formats.lines(rows, found)
    texts = {"table.csv": formats.as_csv(table), "table.md": formats.markdown(told) + "\n",
             "table.tex": formats.latex(told), "table.html": formats.page(told)}  # fmt: skip
    for name, text in texts.items():
        with new_file(rows.folder / name) as part:
            part.write_text(text, "utf-8")
    if "AutoWandbLogger" in _listed(config.loggers) and found:
        log_table(rows.folder, told, table)
    console = Console(file=sys.stdout)
    said = f"{texts['table.md']}\n{rows.folder / 'table.html'}, and table.md, table.csv and table.tex beside it"
    console.print(said, soft_wrap=True, markup=False, highlight=False)
    return 1 if any(one.error for one in found) else 0


def summarised(rows: Rows, found: list[Found], plan: Sequence[Row] | None, config: Namespace) -> Summary:
    """All that outputs show, methods in the order in which they were asked for."""
    asked = list(_methods(config.methods))
    wanted = None if plan is None else sorted(plan, key=lambda row: asked.index(row.method))
    order = {row.place: place for place, row in enumerate(wanted or [])}
    found = sorted(found, key=lambda one: order.get(one.row.place, 0))
    told = summary(rows, found, wanted, lambda lacking: _command(config, lacking))
    return told | {"command": "" if wanted is None else _command(config, wanted)}


def _command(config: Namespace, lacking: Sequence[Row]) -> str:
    """What runs some rows of the plan."""
    words = ["panda", "table"]
    if config.get("study"):
        words += [f"--study={path}" for path in config.study]
        words += [] if config.run else ["--run=true"]
    else:
        words += [f"--config={','.join(_listed(config.config))}"]
        words += [f"--words={config.words}"] if config.words else []
    methods = list(dict.fromkeys(row.method for row in lacking))
    asked = _methods(config.methods)
    if methods != list(asked) and not isinstance(config.methods, dict):
        words.append(f"--methods={','.join(asked[method] for method in methods)}")
    if config.classes is not None or len({row.normal for row in lacking}) < len({r.normal for r in plan_of(config)}):
        words.append(f"--classes={','.join(dict.fromkeys(row.normal for row in lacking))}")
    return shlex.join(words)
