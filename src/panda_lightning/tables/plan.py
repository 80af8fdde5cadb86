"""What a table is made of: a row for each data set, normal class, method, number of shots and seed."""

import hashlib
import inspect
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import yaml

from panda_lightning.arguments import subclasses
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.detectors import Detector
from panda_lightning.types import PandaError

VIEW = ("image_size", "crop", "resize", "interpolation")
ELSEWHERE = tuple(f"--data.{name}=" for name in AnomalyDataModule.COMPUTING)  # where files are, not which
NORMALIZE = re.compile(r"--model\.normalize=(true|false)", re.IGNORECASE)
SET = {
    "--data": "--config", "--data.class_path": "--config", "--config": "--config", "--data.normal_class": "--classes",
    "--data.category": "--classes", "--seed_everything": "--seeds", "--data.seed": "--seeds", "--data.shots": "--shots",
    "--ckpt_path": "rows go on by themselves",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run of a table.

    Attributes:
        data: The data set's class.
        normal: The normal class, or the category.
        method: What the table calls it.
        seed: Of the run, the order of images, and the choice of few.
        shots: How many training images there are; None is all.
        words: Of `lightning`, but for the logger's.
        settings: A fingerprint of the method's words and of what the configuration files said.
    """

    data: str
    normal: str
    method: str
    seed: int
    shots: int | None
    words: tuple[str, ...]
    settings: str

    @property
    def column(self) -> str:
        """The method, with the number of shots where they are few."""
        return self.method if self.shots is None else f"{self.method}, {self.shots}-shot"

    @property
    def variant(self) -> str:
        """The name of its variant's file, by which published figures are found."""
        return Path([word for word in self.words if word.startswith("--config=")][-1].partition("=")[2]).stem

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Its cell of the table, and seed."""
        return self.data, self.normal, self.column, self.seed

    @property
    def name(self) -> str:
        """A name for files, another one where the place or the settings differ."""
        words = " ".join([self.data, self.normal, self.column])
        plain = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")[:100]
        return f"{plain}-{self.seed}-{_digest([*self.place, self.settings])}"

    @property
    def training(self) -> tuple[str, ...]:
        """What it is trained by: its words, but for those that say how images are scored then."""
        others = tuple(word for word in self.words if not NORMALIZE.fullmatch(word))
        told_otherwise = any(re.search(r"\bnormalize\b", word) for word in others)  # which one counts is not known here
        return self.words if told_otherwise else others

    @property
    def normalize(self) -> bool | None:
        """What its words say of model.normalize; None where they say nothing."""
        said = [found[1].lower() == "true" for found in map(NORMALIZE.fullmatch, self.words) if found]
        return said[-1] if said else None

    @property
    def command(self) -> str:
        """What runs it alone."""
        return shlex.join(["lightning", *self.words])

    def files(self) -> dict[str, str]:
        """What the files hold that its options name, as far as they are here: a fingerprint by path."""
        words = [word.partition("=") for word in self.words]
        told: list[Any] = [value for key, _, value in words if key != "--config"]
        told += [_yaml(Path(value)) for key, _, value in words if key == "--config"]
        return {name: file_digest(name) for name in sorted(set(_texts(told))) if os.path.isfile(name)}

    def as_json(self) -> str:
        """For a file, or another process."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, known: str | dict[str, Any]) -> Self:
        """What ``as_json`` wrote, or the dictionary in it."""
        known = json.loads(known) if isinstance(known, str) else known
        return cls(**{**known, "words": tuple(known["words"])})


def planned(
    configs: Sequence[str],
    methods: Mapping[str, str],
    classes: Sequence[str] | None,
    seeds: Sequence[int],
    words: Sequence[str] = (),
    shots: Sequence[int | None] = (None,),
) -> list[Row]:
    """The rows of a table: methods that see the same come together, class by class, so that they share their work.

    Args:
        configs: Configuration files, one laid over the other.
        methods: What the table calls a method: a variant, which is a file in ``variants`` beside the first
            configuration, or the path of a file, and further words for it.
        classes: Normal classes; None is all.
        seeds: Of runs.
        words: Further words for all of them.
        shots: Numbers of training images; None is all.

    Raises:
        PandaError: If a file is missing, or the classes are not known.
    """
    laid: dict[str, Any] = {}
    contents = [_yaml(Path(path)) for path in configs]
    for content in contents:
        laid |= content
    kind = str((laid.get("data") or {}).get("class_path", "")).split(".")[-1]
    known = {cls.__name__: cls for cls in subclasses(AnomalyDataModule)}
    key, names = known[kind].problems() if kind in known else ("normal_class", ())
    there = names
    names = names if classes is None else _named(classes, names)
    if there and (unknown := [name for name in names if name not in there]):
        raise PandaError(f"--classes names {', '.join(unknown)}, but {kind} has {', '.join(there)}: choose from these.")
    if not names:
        raise PandaError(f"the classes of {kind or 'the data set'} are not known beforehand: name them with --classes.")
    common, variants = joined(words), Path(configs[0]).parent / "variants"
    meant = {method: _Method(text, common, variants, laid) for method, text in methods.items()}
    groups: dict[str, list[str]] = {}
    for method, found in meant.items():
        groups.setdefault(found.sees, []).append(method)
    rows = []
    for (_, group), name, count, seed in product(groups.items(), names, shots, seeds):
        for method in group:
            one = meant[method]
            few = [] if count is None else one.few(count)
            own = [*one.words, f"--data.{key}={name}", f"--seed_everything={seed}", f"--data.seed={seed}", *few]
            counting = [word for word in one.words if not word.startswith(ELSEWHERE)]
            settings = _digest([one.verb, contents, one.content, counting])
            files = [f"--config={config}" for config in (*configs, one.file)]
            rows.append(Row(kind, name, method, seed, count, (one.verb, *files, *own), settings))
    return rows


def file_digest(name: str) -> str:
    """A fingerprint of what a file holds; it is read again only where it was written again."""
    about = os.stat(name)
    return _read_digest(name, about.st_mtime_ns, about.st_size)


@cache
def _read_digest(name: str, *_: int) -> str:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value of YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _digest(told: list[Any]) -> str:
    text = json.dumps(told, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def joined(words: Sequence[str]) -> list[str]:
    """Words with ``--key value`` as ``--key=value``.

    Raises:
        PandaError: If one is no option, or sets what the table sets.
    """
    found: list[str] = []
    for word in words:
        if not word.startswith("--") and found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    for word in found:
        name = word.partition("=")[0]
        if not word.startswith("--") or "=" not in word:
            raise PandaError(f"{word!r} is not an option with a value: write words as --key=value.")
        if name in SET or name.startswith("--trainer.logger"):
            raise PandaError(f"{name} is set by the table ({SET.get(name, '--loggers')}): leave it out of the words.")
    return found


def split(text: str) -> list[str]:
    """Words as a shell splits them.

    Raises:
        PandaError: If a quote is open.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PandaError(f"{text!r} cannot be split into words ({error}).") from error


def _named(classes: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Classes by name, where a number stands for one that is known."""
    found = [known[int(c)] if c.isdecimal() and c not in known and int(c) < len(known) else c for c in classes]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise PandaError(f"--classes names {', '.join(twice)} twice.")
    return tuple(found)


class _Method:
    """A variant with further words.

    Attributes:
        file: Of the variant.
        content: Of this file.
        words: Those of all methods, and then its own.
        verb: Of `lightning`.
        sees: What it needs to see images: methods that are equal here share what is decoded.
    """

    def __init__(self, text: str, common: list[str], variants: Path, laid: dict[str, Any]) -> None:
        name, *own = split(text) or [""]
        self.words = [*common, *joined(own)]
        self.file = Path(name) if name.endswith((".yaml", ".yml")) else variants / f"{name}.yaml"
        if not self.file.is_file():
            there = ", ".join(sorted(path.stem for path in variants.glob("*.yaml"))) or "none"
            raise PandaError(f"there is no {self.file}: choose a variant ({there}), or name a file.")
        self.content = _yaml(self.file)
        self.detector = self._detector(laid)
        self.verb = "test" if self.detector.training_step is pl.LightningModule.training_step else "fit"
        self.k = ((laid.get("model") or {}).get("init_args") or {}).get("k")
        view = ((self.content.get("data") or {}).get("init_args") or {}).items()
        told = [f"--data.{key}={value}" for key, value in view if key in VIEW] + self.words
        kinds = ("--model.backbone", *(f"--data.{key}" for key in VIEW))
        self.sees = " ".join(sorted(word for word in told if word.startswith(kinds)))

    def _detector(self, laid: dict[str, Any]) -> type[Detector]:
        path = (self.content.get("model") or {}).get("class_path") or (laid.get("model") or {}).get("class_path") or ""
        module, _, name = str(path).rpartition(".")
        if module.partition(".")[0] not in ("", "panda_lightning"):  # the user's own
            try:
                import_module(module)
            except ImportError as error:
                raise PandaError(f"{path} cannot be imported ({error}): run the command beside its file.") from error
        cls: type[Detector] | None = next((cls for cls in subclasses(Detector) if cls.__name__ == name), None)
        if cls is None:
            raise PandaError(f"{name or 'nothing'} is not a detector: choose a variant of one.")
        return cls

    def few(self, shots: int) -> list[str]:
        """The words for few training images; no more neighbours than there are images."""
        k = inspect.signature(self.detector).parameters.get("k")
        words = [f"--data.shots={shots}"]
        return words if k is None or (self.k or k.default) <= shots else [*words, f"--model.k={shots}"]


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found: Any = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise PandaError(f"{path} cannot be read as a configuration ({' '.join(str(error).split())}).") from error
    if not isinstance(found, dict):
        raise PandaError(f"{path} is no configuration: it must hold keys such as model and data, each with a colon.")
    return found


def spread(rows: Sequence[Row], part: str | None) -> list[Row]:
    """The i-th of n parts of about equal size, of ``i/n``, counted from 1; neighbours share most of their work.

    Raises:
        PandaError: If it is no such part.
    """
    if part is None:
        return list(rows)
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise PandaError(f"--shard={part} is not a part: give i/n with i from 1 to n, such as 2/10.")
    i, n = int(found[1]), int(found[2])
    return list(rows[len(rows) * (i - 1) // n : len(rows) * i // n])
