"""The runs of a table, one after the other in one process: what they share is done once.

Each run is that of ``lightning fit`` (or ``test``, for what trains nothing) with the same words. A row is a JSON file
that appears when its run is complete, with the scores beside it; whoever starts again finds it. Images are decoded once
for all rows that one data module can serve, and the layers that no method changes see each image once
(``prefix_cache_dir``).
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from typing_extensions import override

from panda_lightning.arguments import subclasses
from panda_lightning.callbacks import SampleWiseEarlyStopping
from panda_lightning.cli import VERSION, PandaCLI, run
from panda_lightning.detectors import Detector
from panda_lightning.runtime.whole import held, new_file
from panda_lightning.types import PandaError

KEYS = ("val/auroc_ses", "test/auroc_oracle", "val/auroc", "test/auroc")  # a method's own number: the first there is


@dataclass(frozen=True)
class Row:
    """One run of a table.

    Attributes:
        data: The data set's class.
        normal: The normal class.
        method: What the table calls it.
        seed: Of the run and the order of images.
        words: Of `lightning`, but for the logger's.
    """

    data: str
    normal: str
    method: str
    seed: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name for files, another one where the words differ."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", f"{self.data} {self.normal} {self.method} {self.seed}").strip("-")
        return f"{plain}-{hashlib.sha256(repr(self.words).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Found:
    """What came out of a run.

    Attributes:
        row: Which.
        auroc: Of the last epoch; None where the run failed.
        curve: Epochs trained and AUROC, from the untrained network on.
        seconds: It took.
        version: Of this package, and torch's.
        error: Why it failed.
    """

    row: Row
    auroc: float | None
    curve: list[tuple[float, float]]
    seconds: float
    version: str
    error: str | None = None


class Rows:
    """The rows of a folder.

    Args:
        folder: Where they are: ``rows`` holds what came out, ``runs`` logs and checkpoints, ``shared`` what the frozen
            layers made of images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data: list[Any] = []  # one data module for all rows that it can serve

    def path(self, row: Row) -> Path:
        """The file of a row."""
        return self.folder / "rows" / f"{row.name}.json"

    def read(self) -> list[Found]:
        """What has come out so far, failures too."""
        found = []
        for path in sorted((self.folder / "rows").glob("*.json")):
            known = json.loads(path.read_text("utf-8"))
            row = known.pop("row")
            row = Row(**{**row, "words": tuple(row["words"])})
            found.append(Found(row=row, **{**known, "curve": [tuple(point) for point in known["curve"]]}))
        return found

    def scores(self, row: Row) -> dict[str, Any]:
        """Index, score and label (N,) of the test images of a complete row."""
        with np.load(self.path(row).with_suffix(".npz"), allow_pickle=False) as file:
            return dict(file)

    def make(self, rows: Sequence[Row], again: bool = False) -> Iterator[tuple[Row, Found | None]]:
        """Run what is missing, in order; None stands for a row that was there, or that another process is making.

        Args:
            rows: Which.
            again: Also rows that failed before.
        """
        for row in rows:
            path = self.path(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            with held(path.with_suffix(".lock")) as mine:
                failed = again and path.is_file() and json.loads(path.read_text("utf-8"))["error"]
                found = self._made(row) if mine and (failed or not path.is_file()) else None
            yield row, found

    def _made(self, row: Row) -> Found:
        begin, error = time.monotonic(), None
        curve: list[tuple[float, float]] = []
        scores: dict[str, Any] | None = None
        folder = self.folder / "runs" / row.name
        folder.mkdir(parents=True, exist_ok=True)
        words = [*row.words, "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={self.folder / 'runs'}",
                 f"--trainer.logger.name={row.name}", "--trainer.enable_progress_bar=false",
                 "--trainer.enable_model_summary=false"]  # fmt: skip
        words += ["--ckpt_path=last"] if row.words[0] == "fit" else []
        try:
            with _logged(folder / "log.txt"):
                curve, scores = self._run(words)
        except SystemExit as end:
            if end.code != 2:  # a signal or Ctrl-C, after which the run is to go on; 2 is a refused argument
                raise
            error = (folder / "log.txt").read_text("utf-8").strip().splitlines()[-1].removeprefix("error: ")
        except Exception as failure:  # whatever it is, the other rows go on
            error = " ".join(str(failure).split()) or type(failure).__name__
        auroc = curve[-1][1] if curve else None
        version = f"{VERSION.split()[0]}, torch {torch.__version__}"
        found = Found(row, auroc, curve, time.monotonic() - begin, version, error)
        path = self.path(row)
        if scores is not None:
            with new_file(path.with_suffix(".npz")) as part, part.open("wb") as file:
                np.savez_compressed(file, **scores)
        with new_file(path) as part:
            part.write_text(json.dumps(asdict(found)), "utf-8")
        return found

    def _run(self, words: list[str]) -> tuple[list[tuple[float, float]], dict[str, Any]]:
        """Curve and scores of a run; of one that was cut short, the curve is that of all its parts."""
        cli = run(words, self._sharing())
        model: Any = cli.model
        scores, trainer = model.scores, cli.trainer
        logged = [c for c in trainer.callbacks if isinstance(c, pl.Callback)]  # type: ignore[attr-defined]
        ses = next((c for c in logged if isinstance(c, SampleWiseEarlyStopping)), None)
        values = scores.score if ses is None or ses.score is None else ses.score
        kept = {"index": scores.index.numpy(), "score": values.numpy(), "label": scores.label.numpy()}
        return self._curve(Path(trainer.log_dir or "").parent), kept

    @staticmethod
    def _curve(folder: Path) -> list[tuple[float, float]]:
        rows: list[dict[str, str]] = []
        for path in sorted(folder.glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
            header, *lines = [line.split(",") for line in path.read_text("utf-8").splitlines()]
            rows += [dict(zip(header, line, strict=True)) for line in lines]
        key = next((key for key in KEYS if any(row.get(key) for row in rows)), "")
        points: dict[float, float] = {}
        for row in rows:
            if row.get(key):  # what a run that goes on logs again of earlier epochs is rounded
                points.setdefault(float(row["epochs_trained"]), float(row[key]))
        return sorted(points.items())

    def _sharing(self) -> type[PandaCLI]:
        """A command line whose runs share data modules, and what frozen layers make of images."""
        shared, cache = self._data, str(self.folder / "shared")

        class Sharing(PandaCLI):
            @override
            def after_instantiate_classes(self) -> None:
                super().after_instantiate_classes()
                if isinstance(self.model, Detector):
                    self.model.prefix_cache_dir = cache
                for data in shared:
                    if type(data) is type(self.datamodule):
                        for name, value in self.datamodule.hparams.items():
                            if getattr(data, name, None) != value:
                                setattr(data, name, value)
                        self.datamodule = data
                        return
                shared.append(self.datamodule)

        return Sharing


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What a run says goes to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            yield
    finally:
        handler.close()
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def planned(
    configs: Sequence[str],
    methods: Sequence[str],
    classes: Sequence[str] | None,
    seeds: Sequence[int],
    words: Sequence[str] = (),
) -> list[Row]:
    """The rows of a table, class by class, so that methods share what they share.

    Args:
        configs: Configuration files, one laid over the other.
        methods: Variants, names of files in ``variants`` beside the first configuration, or paths of files.
        classes: Normal classes; None is all.
        seeds: Of runs.
        words: Further words for all of them.

    Raises:
        PandaError: If a file is missing, or a method cannot be told from another.
    """
    laid: dict[str, Any] = {}
    for path in configs:
        laid |= _yaml(Path(path))
    data = laid.get("data") or {}
    kind = str(data.get("class_path", "")).split(".")[-1]
    known = {cls.__name__: cls for cls in subclasses(pl.LightningDataModule)}
    names = [str(name) for name in getattr(known.get(kind), "classes", ())] if classes is None else list(classes)
    if not names:
        raise PandaError(f"the classes of {kind or 'the data set'} are not known beforehand: name them with --classes.")
    files: dict[str, tuple[Path, str]] = {}
    for method in methods:
        own = method.endswith((".yaml", ".yml"))
        file = Path(method) if own else Path(configs[0]).parent / "variants" / f"{method}.yaml"
        if file.stem in files:
            raise PandaError(f"the method {file.stem} is named twice: give its file another name.")
        files[file.stem] = (file, _verb(_yaml(file), laid))
    rows = []
    for name in names:
        for seed in seeds:
            for method, (file, verb) in files.items():
                own_words = [f"--data.normal_class={name}", f"--seed_everything={seed}", f"--data.seed={seed}", *words]
                laid_over = [f"--config={config}" for config in (*configs, file)]
                rows.append(Row(kind, name, method, seed, (verb, *laid_over, *own_words)))
    return rows


def _verb(variant: dict[str, Any], laid: dict[str, Any]) -> str:
    """What Lightning is to do: methods without training steps are tested."""
    name = ((variant.get("model") or {}).get("class_path") or laid["model"]["class_path"]).split(".")[-1]
    cls = next((cls for cls in subclasses(Detector) if cls.__name__ == name), None)
    if cls is None:
        raise PandaError(f"{name} is no detector: choose a variant of one.")
    return "fit" if cls.training_step is not pl.LightningModule.training_step else "test"


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise PandaError(f"{path} cannot be read as a configuration ({error}).") from error
    return found


def spread(rows: Sequence[Row], part: str | None) -> list[Row]:
    """Every n-th row from the i-th on, of ``i/n``, counted from 1.

    Raises:
        PandaError: If it is no such part.
    """
    if part is None:
        return list(rows)
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise PandaError(f"--shard={part} is no part: give i/n with i from 1 to n, such as 2/10.")
    return list(rows)[int(found[1]) - 1 :: int(found[2])]


def machine() -> str:
    """What the numbers were made on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{gpu}, torch {torch.__version__}"
