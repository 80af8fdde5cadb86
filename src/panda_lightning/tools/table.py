"""``panda table --config conf/cifar10.yaml --methods dn2,early,ewc --seeds 0,1``: all normal classes, in one table.

Runs go on where they stopped; what is there is not run again. The folder holds ``table.csv`` (a line a run),
``table.md``, ``table.tex`` and ``table.html`` beside the rows, logs and checkpoints.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from inspect import isabstract
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from pytorch_lightning.loggers import CSVLogger, Logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from panda_lightning.arguments import Count, subclasses
from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.formulas import uncertainty
from panda_lightning.runtime.whole import new_file
from panda_lightning.tables import formats
from panda_lightning.tables.plan import Row, planned, split, spread
from panda_lightning.tables.rows import Found, Rows, machine
from panda_lightning.tables.summary import Summary, summary
from panda_lightning.tables.tracked import log_table
from panda_lightning.types import PandaError

HELP = "Run methods on all normal classes and seeds of a data set, and write one table with intervals."
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "MLFlowLogger": ("mlflow",),
    "CometLogger": ("comet_ml",),
}
OPTIONS = ("config", "methods", "classes", "seeds", "shots", "words", "folder", "loggers")  # which rows, and where
Listed = str | int | list[str | int]


def arguments(parser: OneSentenceParser) -> None:
    """Accept what to run, and where."""
    add = parser.add_argument
    add("--study", action="config", help="A YAML file with any of these options; the command line overrides it.")
    add("--config", type=Listed, default="", help="Configuration files of `lightning`, separated by commas.")
    add("--methods", type=Listed | dict[str, str], default="dn2",
        help="Variants (files in `variants` next to the first configuration) or other files, separated by commas, each "
        "with its own options if needed: 'dn2,dn2 --model.k=1'. In a study a mapping gives them names.")  # fmt: skip
    add("--classes", type=Listed | None, default=None, help="Normal classes; by default all classes of the data set.")
    add("--seeds", type=Listed, default="0", help="Seeds: each method runs on each class with each seed.")
    add("--shots", type=Listed | None, default=None, help="Numbers of training images, such as 1,4,16; by default all.")
    add(
        "--words",
        type=str,
        default="",
        help="Options of `lightning` for all methods; a method's own options override them.",
    )
    add("--folder", type=Path | None, default=None, help="Folder for all files; by default tables/<data set>.")
    add("--loggers", type=Listed, default="", help="Besides CSV: AutoWandbLogger, TensorBoardLogger, MLFlowLogger.")
    add("--shard", type=str | None, default=None, help="Run only the i-th of n parts: i/n.")
    add("--jobs", type=Count, default=1, help="Runs to make at a time; each has its share of the CPU and the GPUs.")
    add("--again", type=bool, default=False, help="Run failed rows again.")
    add("--run", type=bool, default=True, help="false: run nothing, and write the table of the finished rows.")
    add("--merge", type=Listed, default="", help="Copy the rows of these folders into --folder, and run nothing.")


def run(config: Namespace) -> int:
    """Run what is missing, and write the table of what there is."""
    if config.merge:
        if config.folder is None:
            raise PandaError("--merge needs --folder, to which the rows are copied.")
        merge(_listed(config.merge), config.folder)
        return _written(Rows(config.folder), None, config)
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 or "LOCAL_RANK" in os.environ:
        raise PandaError(
            "`panda table` is one process, and starts those of --trainer.devices itself: start it without "
            "torchrun, and with srun --ntasks 1."
        )
    plan = plan_of(config)
    rows = Rows(config.folder or Path("tables") / plan[0].data.lower(), _loggers(config.loggers))
    if rows.folder.exists() and not rows.folder.is_dir():
        raise PandaError(f"--folder={rows.folder} is a file: name a folder.")
    if config.run:
        _make(rows, spread(plan, config.shard), config.again, config.jobs)
    return _written(rows, plan, config)


def plan_of(config: Namespace) -> list[Row]:
    """The rows that the options ask for."""
    configs = _listed(config.config)
    if not configs:
        raise PandaError("--config is missing: name a configuration such as conf/digits.yaml.")
    classes = None if config.classes is None else _listed(config.classes)
    shots = [None] if config.shots is None else _numbers("shots", config.shots, 1)
    return planned(
        configs, _methods(config.methods), classes, _numbers("seeds", config.seeds, 0), split(config.words), shots
    )


def _listed(given: Any) -> list[str]:
    parts = given if isinstance(given, list) else str(given).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _loggers(given: Any) -> list[str]:
    """Classes of loggers that can work here."""
    named = _listed(given)
    known = sorted(cls.__name__ for cls in subclasses(Logger) if not isabstract(cls))
    for name in named:
        if name == CSVLogger.__name__:
            raise PandaError("--loggers=CSVLogger is not needed: each run is logged to CSV, so leave it out.")
        if name not in known:
            raise PandaError(f"--loggers={name} is not a logger: choose from {', '.join(known)}.")
        if name in PACKAGES and not any(map(find_spec, PACKAGES[name])):
            package = PACKAGES[name][0]
            raise PandaError(f"{name} needs the package {package}: `pip install {package}`, or leave it out.")
    return named


def _numbers(name: str, given: Any, least: int) -> list[int]:
    found = [int(word) if word.isdecimal() else -1 for word in _listed(given)]
    if min(found, default=-1) < least:
        example = "0,1,2" if not least else "1,4,16"
        raise PandaError(
            f"--{name}={given} are not whole numbers of at least {least}, separated by commas, such as {example}."
        )
    return found


def _methods(given: Any) -> dict[str, str]:
    """What the table calls methods, and their variants with words."""
    if isinstance(given, dict):
        found = {str(name).strip(): str(meant) for name, meant in given.items()}
        if "" in found:
            raise PandaError("a method of --methods has no name.")
        return found
    found = {}
    for method in _listed(given):
        variant, *own = split(method)
        name = " ".join([Path(variant).stem if variant.endswith((".yaml", ".yml")) else variant, *own])
        if name in found:
            raise PandaError(f"the method {name} is named twice: give it another name, or its file.")
        found[name] = method
    if not found:
        raise PandaError("--methods is empty: name variants, such as dn2,early.")
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

    def left(self, rows: Sequence[Row], jobs: int = 1) -> tuple[float, list[str]]:
        """How long they all take, so many at a time, in seconds, but for those of the methods that are named."""
        times = {row.name: self.seconds(row) for row in rows}
        unknown = list(dict.fromkeys(row.column for row in rows if times[row.name] is None))
        return sum(seconds for seconds in times.values() if seconds is not None) / jobs, unknown


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _make(rows: Rows, plan: Sequence[Row], again: bool, jobs: int) -> None:
    """Run them with a bar for the whole, and below it the run of the moment, if it is one; a line for each."""
    console = Console(file=sys.stdout)  # runs have theirs redirected
    columns = (TextColumn("{task.description}"), BarColumn(12), TimeElapsedColumn(), TextColumn("{task.fields[end]}"))
    waiting = {row.name: row for row in plan if again or not rows.path(row).is_file()}

    def at_once() -> int:
        return min(jobs, len(rows.groups(list(waiting.values()))) or 1)

    expected = Expected(rows.read())
    options: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    try:
        rows.require_files([row for row in plan if row.name not in waiting])
        rows.require_words(list(waiting.values()))
        with (
            Progress(*columns, console=console, disable=not console.is_terminal, **options) as progress,
            closing(rows.make(plan, again, jobs)) as made,  # its processes end with it, not when Python finds garbage
        ):
            whole = progress.add_task("", total=len(plan), end="")
            single = progress.add_task("", total=None, end="", visible=jobs == 1)

            def tell(done: int) -> None:
                if done == len(plan):
                    return
                row = plan[done]
                left, unknown = expected.left(list(waiting.values()), at_once())
                end = time.strftime("%H:%M", time.localtime(time.time() + left))
                known = f"until about {end}{' at least' if unknown else ''}" if left else ""
                told = f"Row {done + 1} of {len(plan)}{f', {at_once()} at a time' if jobs > 1 else ''}"
                progress.update(whole, completed=done, description=told, end=known)
                own = expected.seconds(row)
                name = f"{row.normal}, {row.column}, seed {row.seed}"
                progress.reset(single, total=None, description=name if len(name) <= 34 else f"{name[:33]}…")
                progress.update(single, end="" if own is None else f"of about {_time(own)}")

            tell(0)
            for number, (row, found) in enumerate(made, 1):  # another row, where there are several at a time
                waiting.pop(row.name, None)
                if found is not None:
                    expected.known += [found] if found.error is None else []
                    rest = _left(*expected.left(list(waiting.values()), at_once())) if waiting else ""
                    console.print(f"{_line(rows, found)}{rest}", soft_wrap=True, markup=False, highlight=False)
                tell(number)
    except (KeyboardInterrupt, SystemExit) as end_of_it:
        done = sum(rows.path(row).is_file() for row in plan)
        console.print(f"Stopped with {done} of {len(plan)} rows: run the same command to continue.", soft_wrap=True)
        code = getattr(end_of_it, "code", 1)
        raise SystemExit(130 if code == 1 else code) from end_of_it  # Lightning ends with 1 at Ctrl-C
    missing = sum(not rows.path(row).is_file() for row in plan)
    if missing:
        console.print(
            f"Another process is making {missing} of these rows, which are not in the table yet: when it is done, "
            "--run false writes the whole table.", soft_wrap=True,
        )  # fmt: skip


def _left(seconds: float, unknown: Sequence[str]) -> str:
    """What is said of the rest."""
    named = ", ".join(unknown[:3]) + (", ..." if unknown[3:] else "")
    return f"; about {_time(seconds)} left" + (f" and the time of {named}, not known yet" if unknown else "")


def _line(rows: Rows, found: Found) -> str:
    row = found.row
    head = f"{row.data}, {row.normal}, {row.column}, seed {row.seed}:"
    if found.error is not None:
        return f"{head} failed ({found.error})"
    kept = rows.scores(row)
    sure = uncertainty.interval(kept["score"], kept["label"])
    passed = sum(work.images for work in found.work if work.verb.startswith("passed"))
    worked = f", {passed} images through frozen layers" if passed else ""
    warned = f", {len(found.warnings)} warning{'s' * (len(found.warnings) > 1)}" if found.warnings else ""
    return f"{head} {sure.value:.4f} [{sure.low:.4f}, {sure.high:.4f}] in {found.seconds:.1f} s{worked}{warned}"


# ---- outputs ---------------------------------------------------------------------------------------------------------


def merge(folders: Sequence[str], into: Path) -> None:
    """Copy the rows of other folders; of a row that is in several, the first that did not fail stays.

    Raises:
        PandaError: If one has no rows, or a method was run with different settings.
    """
    target = Rows(into)
    found = target.read()
    sources = {folder: Rows(Path(folder)) for folder in folders}
    for folder, source in sources.items():
        own = source.read()
        if not own:
            raise PandaError(f"{folder} has no rows: name the --folder of a `panda table`.")
        found += own
    _require_one_setting(found)
    failed = {one.row.name for one in target.read() if one.error}
    for source in sources.values():
        for one in source.read():
            name, path = one.row.name, target.path(one.row)
            if path.exists() and (name not in failed or one.error):
                continue
            for part in (f"hardest/{name}.npz", f"rows/{name}.npz", f"rows/{name}.json"):  # the row itself last
                if (source.folder / part).is_file():
                    with new_file(into / part) as new:
                        shutil.copyfile(source.folder / part, new)
            failed = failed | {name} if one.error else failed - {name}


def _require_one_setting(found: Sequence[Found]) -> None:
    """A mean is over runs of one kind."""
    kinds: dict[tuple[str, str], Row] = {}
    for one in found:
        other = kinds.setdefault((one.row.data, one.row.column), one.row)
        if other.settings != one.row.settings:
            raise PandaError(
                f"{one.row.column} was run on {one.row.data} with two settings (`{other.command}` and "
                f"`{one.row.command}`, or files that changed in between): keep them in separate folders, or give "
                "one of them another name."
            )


def _written(rows: Rows, plan: Sequence[Row] | None, config: Namespace) -> int:
    """Write the tables and say where; the status is 1 where a run of the plan failed."""
    wanted = None if plan is None else {row.name for row in plan}
    found = [one for one in rows.read() if wanted is None or one.row.name in wanted]
    if not found and plan is None:
        raise PandaError(f"there are no rows in {rows.folder} yet.")
    _require_one_setting(found)
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


def summarised(rows: Rows, found: Sequence[Found], plan: Sequence[Row] | None, config: Namespace) -> Summary:
    """All that outputs show, methods in the order in which they were asked for."""
    if plan is None:
        return summary(rows, found, None) | {"command": ""}
    asked = list(_methods(config.methods))
    wanted = sorted(plan, key=lambda row: asked.index(row.method))
    order = {row.place: place for place, row in enumerate(wanted)}
    found = sorted(found, key=lambda one: order[one.row.place])
    failed = {one.row.place for one in found if one.error}
    told = summary(rows, found, wanted, lambda lacking: _command(config, lacking, failed))
    return told | {"command": _command(config, wanted, set())}


def _command(config: Namespace, lacking: Sequence[Row], failed: set[Any]) -> str:
    """The words that run some rows of the plan: all options that were given, and no more methods and classes."""
    parser = OneSentenceParser()
    arguments(parser)
    studies = [f"--study={path}" for path in config.get("study") or ()]
    usual = parser.parse_args(studies)
    asked = _methods(config.methods)
    methods = {row.method: asked[row.method] for row in lacking}
    classes = list(dict.fromkeys(row.normal for row in lacking))
    options = {key: config[key] for key in OPTIONS} | {
        "run": True,
        "again": any(row.place in failed for row in lacking),
    }
    if methods != asked:
        options["methods"] = methods if isinstance(config.methods, dict) else list(methods.values())
    if len(classes) < len({row.normal for row in plan_of(config)}):
        options["classes"] = classes
    words = [f"--{key}={_text(value)}" for key, value in options.items() if value != usual[key]]
    return shlex.join(["panda", "table", *studies, *words])


def _text(value: Any) -> str:
    """An option's value on the command line."""
    if isinstance(value, list) and not any("," in str(part) for part in value):
        return ",".join(str(part) for part in value)
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
