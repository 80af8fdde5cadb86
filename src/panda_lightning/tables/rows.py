"""The runs of a table, one after the other in one process: what they share is done once.

Each run is that of ``lightning fit`` (or ``test``, for what trains nothing) with the same words. A row is a JSON file
that appears when its run is complete, with the scores beside it; whoever starts again finds it. Rows of one view share
what is decoded, and the layers that no method changes see each image once (``prefix_cache_dir``). Rows that differ in
scoring alone are trained once. A run on several devices is a process of its own, which starts the others.
"""

import errno
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from panda_lightning.callbacks import Report, SampleWiseEarlyStopping, SaveOnSignal
from panda_lightning.cli import PandaCLI, run
from panda_lightning.command.endings import is_ours, refusal, silence
from panda_lightning.command.parser import VERSION
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.detectors import DN2, Detector
from panda_lightning.networks.prefix_cache import cache_prefix
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.runtime.systems import TRY_AGAIN, heritable
from panda_lightning.runtime.whole import held, new_file
from panda_lightning.runtime.work import Work
from panda_lightning.tables.plan import Row, file_digest
from panda_lightning.tables.scorings import OtherScorings
from panda_lightning.tables.workers import done_by
from panda_lightning.types import PandaError, UnwritableError

# a method's own number: the first there is
KEYS = ("val/auroc_ses", "test/auroc_oracle", "val/auroc", "test/auroc", "val/auroc_autoencoder")
HARDEST, SIDE = 6, 96  # pictures of either kind, and their side in pixels


@dataclass(frozen=True)
class Found:
    """What came out of a run.

    Attributes:
        row: Which.
        images: A fingerprint of the test images.
        curve: Epochs trained and AUROC, from the untrained network on.
        seconds: It took, with the parts before it was told to end.
        work: What it did for others too.
        made: By which version, on what machine, and when.
        error: Why it failed.
        files: What the files held that its options name: a fingerprint by path.
        warnings: What it warned of.
    """

    row: Row
    images: str
    curve: list[tuple[float, float]]
    seconds: float
    work: list[Work]
    made: str
    error: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def auroc(self) -> float | None:
        """Of the last epoch; None where the run failed."""
        return self.curve[-1][1] if self.curve else None


class SeveralDevicesError(Exception):
    """The run wants several devices."""


class Rows:
    """The rows of a folder.

    Args:
        folder: Where they are: ``rows`` holds what came out, ``hardest`` pictures, ``runs`` logs and checkpoints,
            ``shared`` what the frozen layers made of images, ``locks`` who is at work.
        loggers: Of Lightning, by class, beside the CSV logger.
    """

    def __init__(self, folder: Path, loggers: Sequence[str] = ()) -> None:
        self.folder = folder
        self.loggers = loggers
        self._decoded: dict[type[Any], Any] = {}  # what data modules of a class have decoded

    def path(self, row: Row) -> Path:
        """The file of a row."""
        return self.folder / "rows" / f"{row.name}.json"

    def read(self) -> list[Found]:
        """What has come out so far, failures too."""
        return [self._read(path) for path in sorted((self.folder / "rows").glob("*.json"))]

    def _read(self, path: Path) -> Found:
        try:
            known = json.loads(path.read_text("utf-8"))
            known["work"] = [Work(*work) for work in known["work"]]
            known["curve"] = [tuple(point) for point in known["curve"]]
            found = Found(**{**known, "row": Row.of(known["row"])})
        except (ValueError, KeyError, TypeError) as error:
            raise PandaError(f"{path} is not a row of a table ({error}): remove it to run the row again.") from error
        if found.error is None and not path.with_suffix(".npz").is_file():
            raise PandaError(
                f"{path} has no scores any more, {path.stem}.npz is missing: remove it to run the row again."
            )
        return found

    def scores(self, row: Row) -> dict[str, Any]:
        """Index, score, label and kind (N,) of the test images of a complete row."""
        return _arrays(self.path(row).with_suffix(".npz"))

    def hardest(self, row: Row) -> dict[str, Any]:
        """The test images that scores mistake most, where the pictures are here: places in the scores, and JPEGs."""
        path = self.folder / "hardest" / f"{row.name}.npz"
        return _arrays(path) if path.is_file() else {}

    def make(
        self, rows: Sequence[Row], again: bool = False, jobs: int = 1
    ) -> Generator[tuple[Row, Found | None], None, None]:
        """Run what is missing; None stands for a row that was there, or that another process is making.

        Args:
            rows: Which; those that are trained alike come together, and else in order where one is made at a time.
            again: Also rows that failed before.
            jobs: How many to make at a time, each in a process of its own.
        """
        together, groups = partial(self._together, again), self.groups(rows)
        if jobs > 1:
            missing = [group for group in groups if any(self._missing(row, again) for row in group)]
            yield from ((row, None) for group in groups if group not in missing for row in group)
            groups = missing
        for made in map(together, groups) if jobs == 1 else done_by(jobs, together, groups):
            yield from made

    def require_files(self, rows: Sequence[Row]) -> None:
        """See that rows which are there were made with the files that their options name now.

        Raises:
            PandaError: If one has changed.
        """
        for path in filter(Path.is_file, map(self.path, rows)):
            for name, before in self._read(path).files.items():
                if os.path.isfile(name) and file_digest(name) != before:
                    raise PandaError(
                        f"{name} has changed since {path} was made with it: name another --folder, or remove the row "
                        "to run it again."
                    )

    def require_words(self, rows: Sequence[Row]) -> None:
        """Make what one run of each method is made of, so that a wrong word is known before the first run.

        Raises:
            PandaError: If a run could not begin.
        """
        for row in {row.method: row for row in rows}.values():
            with TemporaryDirectory() as folder:
                log = Path(folder) / "log.txt"
                try:
                    with _logged(log, [], []):
                        run([*row.words, "--trainer.logger=false"], _NotRun)
                except (SystemExit, Exception) as failure:
                    if isinstance(failure, SystemExit) and failure.code != 2:  # a signal
                        raise
                    raise PandaError(f"{row.method} cannot run: {_sentence(failure, log)}") from failure

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that are trained alike; loggers want a run for each."""
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            alike = row.words[0] == "fit" and not self.loggers
            groups.setdefault(row.training if alike else row.name, []).append(row)
        return list(groups.values())

    def _missing(self, row: Row, again: bool) -> bool:
        path = self.path(row)
        return not path.is_file() or (again and self._read(path).error is not None)

    def _together(self, again: bool, rows: Sequence[Row]) -> list[tuple[Row, Found | None]]:
        """Run what is missing of a group, with as few runs as possible."""
        made: dict[Row, Found | None] = dict.fromkeys(rows)
        with ExitStack() as stack:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            locks = {row: stack.enter_context(held(self.folder / "locks" / row.name)) for row in rows}
            mine = [row for row in rows if locks[row] and self._missing(row, again)]
            while todo := sorted((row for row in mine if made[row] is None), key=lambda row: row.normalize is not None):
                made |= {found.row: found for found in self._made(todo[0], todo[1:], locks[todo[0]])}
        return list(made.items())

    def _made(self, row: Row, others: Sequence[Row] = (), lock: int | None = None) -> list[Found]:
        """Run it and write what came out, also for others of its group; of several processes, the first writes."""
        begin, error = time.monotonic(), None
        images, curves, extra, files = "", {row: list[tuple[float, float]]()}, 0.0, row.files()
        log, work, warned = self.folder / "runs" / row.name / "log.txt", list[Work](), list[str]()
        spent = log.with_name("seconds.txt")  # of earlier parts of a run that goes on
        before = float(spent.read_text("utf-8")) if spent.is_file() else 0.0
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with _logged(log, work, warned), _own_wandb_run():
                images, curves, extra = self._run(row, others)
        except SeveralDevicesError:
            return [self._made_apart(row, log, lock)]
        except SystemExit as end:
            if end.code != 2:  # a signal or Ctrl-C, after which the run is to go on; 2 is a refused argument
                spent.write_text(str(before + time.monotonic() - begin), "utf-8")
                raise
            error = _sentence(end, log)
        except Exception as failure:  # whatever it is, the other rows go on, but where there is no room for them
            if isinstance(refusal(failure), UnwritableError):
                raise
            if getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise PandaError(f"{failure}. Free disk space, and run the same command again.") from failure
            error = _sentence(failure, log)
        seconds = {one: extra / max(1, len(curves) - 1) for one in curves}
        seconds[row] = before + time.monotonic() - begin - extra
        return [  # its own row last: killed before it, the run goes on from its end, and writes the others again
            self._write(
                Found(one, images, curves[one], seconds[one], work if one == row else [], made(), error, files, warned)
            )
            for one in reversed(curves)
        ]

    def _write(self, found: Found) -> Found:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with new_file(self.path(found.row)) as part:
                part.write_text(json.dumps(asdict(found)), "utf-8")
        return found

    def _made_apart(self, row: Row, log: Path, lock: int | None) -> Found:
        """Run it in a process of its own, which Lightning starts again for each device.

        On Windows the lock goes with this process: killed while the other goes on, it leaves a row that a second table
        may make once more.
        """
        words = [sys.executable, "-m", __spec__.name, str(self.folder), row.as_json(), *self.loggers]
        with log.open("a", encoding="utf-8") as file:
            status = subprocess.run(words, stdout=file, stderr=file, check=False, pass_fds=heritable(lock)).returncode
        if status < 0 or status in (TRY_AGAIN, 130, 143):  # a signal: the run is to go on
            raise SystemExit(status if status > 0 else 128 - status)
        if not self.path(row).is_file():
            said = f"a process ended with status {status}: see {log}"
            return self._write(Found(row, "", [], 0.0, [], made(), said))
        return self._read(self.path(row))

    def _run(self, row: Row, others: Sequence[Row]) -> tuple[str, dict[Row, list[tuple[float, float]]], float]:
        """Test images; curves of a run, and of others of its group, whose scores are written; seconds for the others.

        A curve is that of all parts of the run.
        """
        words = [*row.words, f"--trainer.logger={json.dumps(self._loggers(row))}",
                 "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]  # fmt: skip
        words += ["--ckpt_path=last"] if row.words[0] == "fit" else []
        cli = run(words, self._sharing(others))
        model, data, trainer = cli.model, cli.datamodule, cli.trainer
        log_dir = Path(trainer.log_dir or "")  # asks all processes
        if not trainer.is_global_zero:
            return "", {row: []}, 0.0
        curve, scores = self._curve(log_dir.parent, model.auroc_name), model.scores
        if scores is None or not curve:
            raise PandaError("the run has given no AUROC: let it validate, on normal and anomalous images.")
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        ses = next((c for c in callbacks if isinstance(c, SampleWiseEarlyStopping)), None)
        scored = next((c for c in callbacks if isinstance(c, OtherScorings)), OtherScorings({}))
        curves = {row: curve}
        self._keep(row, data, scores, scores.score if ses is None or ses.score is None else ses.score)
        for other in others:
            if known := scored.found.get(other.name):
                curves[other] = [tuple(point) for point in known["curve"]]
                self._keep(other, data, scores, known["score"])
        return model.origin["test images"], curves, scored.seconds

    def _keep(self, row: Row, data: Any, scores: Any, score: Any) -> None:
        """Write the scores of a row, and the pictures that they mistake most."""
        values, index, label = score.numpy(), scores.index.numpy(), scores.label.numpy()
        dataset = data.test_dataloader().dataset
        kind = np.array(data.classes)[dataset.images.targets[index]]
        _save(self.path(row).with_suffix(".npz"), index=index, score=values, label=label, kind=kind)
        order = np.argsort(values, kind="stable")
        hard = np.concatenate([order[label[order] == 1][:HARDEST], order[label[order] == 0][::-1][:HARDEST]])
        shown = (dataset.pictures(one)[0] for one in scores.index[hard.copy()].split(1))  # which may differ in size
        jpeg = np.array([_jpeg(picture.numpy()) for picture in shown])
        _save(self.folder / "hardest" / f"{row.name}.npz", place=hard, jpeg=jpeg)

    def _loggers(self, row: Row) -> list[dict[str, Any]]:
        """CSV, from which the curve comes, and those that were asked for."""
        place = self.folder / "runs"
        own: dict[str, dict[str, Any]] = {
            "AutoWandbLogger": {"name": row.name, "id": f"{row.name}-{fingerprint(str(self.folder.absolute()))}",
                                "resume": "allow", "group": row.data, "job_type": row.column,
                                "tags": [row.normal, f"seed {row.seed}"]},
            # folders of their own: MLflow takes each folder beside its own for an experiment, and TensorBoard shows a
            # run that goes on as one only where its files lie together
            "MLFlowLogger": {"save_dir": str(place / "mlruns"), "experiment_name": row.data, "run_name": row.name},
            "TensorBoardLogger": {"save_dir": str(place / "tensorboard"), "name": row.name, "version": "",
                                  "default_hp_metric": False},
        }  # fmt: skip
        if "MLFlowLogger" in self.loggers and "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses files unless this is said
        runs = {"save_dir": str(place)}
        first = {"class_path": "CSVLogger", "init_args": {**runs, "name": row.name}}
        more = [{"class_path": one, "init_args": {**runs, **own.get(one, {"name": row.name})}} for one in self.loggers]
        return [first, *more]

    @staticmethod
    def _curve(folder: Path, name: str) -> list[tuple[float, float]]:
        rows: list[dict[str, str]] = []
        for path in sorted(folder.glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
            header, *lines = [line.split(",") for line in path.read_text("utf-8").splitlines()] or [[]]
            whole = (line for line in lines if len(line) == len(header))  # a full disk may have cut the last
            rows += [dict(zip(header, line, strict=True)) for line in whole]
        keys = (*KEYS, f"val/{name}", f"test/{name}")
        key = next((key for key in keys if any(row.get(key) for row in rows)), "")
        points: dict[float, float] = {}
        for row in rows:
            if row.get(key):  # what a run that goes on logs again of earlier epochs is rounded
                points.setdefault(float(row["epochs_trained"]), float(row[key]))
        return sorted(points.items())

    def _sharing(self, others: Sequence[Row]) -> type[PandaCLI]:
        """A command line whose runs share decoded images, what frozen layers make of them, and training."""
        shared, cache = self._decoded, str(self.folder / "shared")

        class Sharing(PandaCLI):
            @override
            def after_instantiate_classes(self) -> None:
                super().after_instantiate_classes()
                callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
                if self.trainer.world_size > 1 and __name__ != "__main__":
                    raise SeveralDevicesError
                if isinstance(self.model, Detector):
                    self.model.prefix_cache_dir = cache
                if isinstance(self.model, DN2) and not self.model.learns:
                    callbacks.append(_FeaturesOnce(cache))
                if others and _trains_for_others(self.model, callbacks):
                    own = self.model.normalize
                    asked = {row.name: own if row.normalize is None else row.normalize for row in others}
                    callbacks.append(OtherScorings(asked))
                if isinstance(self.datamodule, AnomalyDataModule):
                    self.datamodule.decoded = shared.setdefault(type(self.datamodule), self.datamodule.decoded)
                callbacks.append(Report(pictures=False))  # the table's page shows them
                if self.config.subcommand == "fit" and not any(isinstance(c, SaveOnSignal) for c in callbacks):
                    callbacks.insert(0, SaveOnSignal())  # a table that is told to end loses no epoch

        return Sharing


def _trains_for_others(model: Any, callbacks: Sequence[Any]) -> bool:
    """Whether training is the same for each value of ``normalize``.

    Classes of users may read it, or a score; and what monitors a metric may stop by it.
    """
    known = ("panda_lightning.", "pytorch_lightning.")
    ours = all(type(one).__module__.startswith(known) for one in (model, *callbacks))
    stops = any(getattr(one, "monitor", None) and not isinstance(one, Checkpoint) for one in callbacks)
    searches = isinstance(model, DN2) and "normalize" in model.hparams and model.has_bank and not model.shard_bank
    return ours and searches and not stops


class _NotRun(PandaCLI):
    """Makes trainer, model and data, and leaves it at that."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        trainer: Any = self.trainer
        if trainer.fast_dev_run or (subcommand == "fit" and trainer.limit_val_batches == 0):
            raise PandaError("fast_dev_run and limit_val_batches=0 leave no AUROC: leave them out.")


def _sentence(failure: BaseException, log: Path) -> str:
    """Why a run failed; of a refused argument the log's last line says it."""
    if isinstance(failure, SystemExit):
        return log.read_text("utf-8").strip().splitlines()[-1].removeprefix("error: ")
    return " ".join(str(refusal(failure) or failure).split()) or type(failure).__name__


class _FeaturesOnce(pl.Callback):
    """Keeps the features of a method that trains nothing: for other rows they are those of the frozen layers."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for loader in (pl_module.data.normal_dataloader(), pl_module.data.test_dataloader()):
            cache_prefix(trainer, pl_module.backbone, loader, 0, False, self._folder)


def _save(path: Path, **arrays: Any) -> None:
    with new_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _jpeg(picture: Any) -> bytes:
    """A picture (3, H, W) uint8, no larger than is looked at."""
    image, file = Image.fromarray(picture.transpose(1, 2, 0)), BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, format="JPEG", quality=80)
    return file.getvalue()


class _Collected(logging.FileHandler):
    """A log file, and what its records say of work."""

    def __init__(self, path: Path, work: list[Work]) -> None:
        super().__init__(path, encoding="utf-8")
        self.work = work

    @override
    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self.work += [record.work] if hasattr(record, "work") else []


@contextmanager
def _own_wandb_run() -> Iterator[None]:
    """W&B's run ends with the row, also where it failed: else the next row would go on in it."""
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))


@contextmanager
def _logged(path: Path, work: list[Work], warned: list[str]) -> Iterator[None]:
    """What a run says goes to a file, and of it what is done for others too, and our warnings, to lists."""
    handler = _Collected(path, work)
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    show = warnings.showwarning

    def shown(
        message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        warned.extend([str(message)] if is_ours(filename) else [])
        show(message, category, filename, lineno, file, line)

    try:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("a", encoding="utf-8"))
            stack.enter_context(redirect_stdout(file))
            stack.enter_context(redirect_stderr(file))
            stack.enter_context(warnings.catch_warnings())  # what was said in one row is said in the next again
            warnings.showwarning = shown
            yield
    finally:
        handler.close()
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def made() -> str:
    """Version and commit of this package, torch, hardware and day."""
    return ", ".join([f"panda-lightning {VERSION.split()[0]}{_commit()}", f"torch {torch.__version__}", machine(),
                      time.strftime("%Y-%m-%d")])  # fmt: skip


@cache
def machine() -> str:
    """What numbers are made on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpus, about = os.cpu_count(), Path("/proc/cpuinfo")
    lines = about.read_text("utf-8").splitlines() if about.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{cpus} cores of {names[0] if names else platform.machine()}"


@cache
def _commit() -> str:
    """The commit that this package is at, where it is a checkout; with + where it was changed since."""

    def git(*words: str) -> str:
        told = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return told.stdout.strip()

    here = Path(__file__).parent
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return (
            f" at {git('rev-parse', '--short', 'HEAD')}{'+' if git('status', '--porcelain', str(here.parent)) else ''}"
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":  # a run on several devices
    silence()
    Rows(Path(sys.argv[1]), sys.argv[3:])._made(Row.of(sys.argv[2]))
