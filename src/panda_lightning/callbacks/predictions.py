"""What ``lightning predict`` leaves behind: a table of scores, and anomaly maps."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from typing_extensions import override

from panda_lightning.arguments import Checked, OpenShare
from panda_lightning.callbacks.anomaly_maps import coloured, outline
from panda_lightning.formulas.conformal import benjamini_hochberg, discoverable, flagged
from panda_lightning.pictures.pixels import Source
from panda_lightning.pictures.view import MapSize
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.runtime.results import Calibration, flat, level_of, results
from panda_lightning.runtime.systems import lock
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import Batch, PandaError

PART = "predictions.part-"  # files of rows as they come: one of each process of each attempt


def own_size(asked: MapSize | None, detector: Any) -> bool:
    """Whether maps are to have the pixels of each image: as asked for, else as the detector's metrics take them."""
    return (asked or getattr(detector, "map_size", "view")) == "original"


class Predictions(Checked, pl.Callback):
    """Writes one row per image, in the data set's order, to predictions.csv and predictions.jsonl in the run's folder.

    A row has path, score, p_value, anomalous, the nearest normal images with their distances and, for an unreadable
    image, the reason (runtime/results.py). Rows are written immediately, so memory does not grow with their number. If
    a run on unlabelled images was interrupted, the same command continues from the rows in the log's other folders.

    If the detector makes maps, ``maps/<path>.npy`` is the map, (H, W) float32, and ``maps/<path>.png`` shows it in
    colour over the image. The colours span the range of maps in the test that saved the checkpoint, or the range of
    this map if there was no test; the outline is that test's threshold of best F1 (oracle). <path> keeps its ending
    (``maps/cam.png.npy``), because a folder may contain both ``cam.jpg`` and ``cam.png``.

    Args:
        alpha: An image is anomalous if its p-value is at most alpha; None is .05, if the calibration allows it.
        alpha_fdr: Mark images in ``anomalous_fdr`` so that on average at most this share of them is normal: Benjamini
            and Hochberg's procedure over the p-values of the finished table.
        maps: For DN2, PANDA and MSC, draw how much each part of the image contributes to the distance.
        map_size: Write maps at the size of the network's input (view), or at the size of each image (original): pixels
            outside the crop are then NaN and not coloured. None uses the detector's ``map_size``, if it has one.
    """

    def __init__(
        self,
        alpha: OpenShare | None = None,
        alpha_fdr: OpenShare | None = None,
        maps: bool = False,
        map_size: MapSize | None = None,
    ) -> None:
        self.alpha = alpha
        self.alpha_fdr = alpha_fdr
        self.maps = maps
        self.map_size = map_size
        self._identity = ""  # of what is scored by what; empty where no attempt can go on
        self._earlier: list[BinaryIO] = []  # parts of attempts that were cut short; open, so that they stay locked
        self._sentences: list[str] = []

    def left(self, trainer: pl.Trainer, detector: Any, images: Any) -> list[int]:
        """The rows of images that no attempt, cut short, has scored yet; every process must call it.

        Args:
            trainer: Its log's folders are searched.
            detector: What is to score them.
            images: They; see pictures.loose.Loose.
        """
        folder, done = _folder(trainer), []
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        columns = [type(c).__name__ for c in callbacks if not type(c).__module__.startswith("pytorch_lightning.")]
        shown = (self.maps, own_size(self.map_size, detector), columns)
        self._identity = fingerprint(detector.scored_by, detector.origin, images.fingerprint(), shown)
        if trainer.is_global_zero:
            versions = folder.parent.glob("version_*") if folder.name.startswith("version_") else [folder]
            found = [_taken(part, self._identity) for v in sorted(versions) for part in sorted(v.glob(f"{PART}*"))]
            self._earlier = [file for file in found if file is not None]
            places = _places([Path(file.name) for file in self._earlier])
            done = [i for i, row in zip(places, _rows(places, list(places)), strict=True) if not row["unreadable"]]
        missing = set(range(len(images))).difference(trainer.strategy.broadcast(done))
        return sorted(missing)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._drawn_before, pl_module.maps = pl_module.maps, self.maps
        self._calibration: Calibration | None = None
        self._level: float | None = None
        self._begun = self._drew = False
        self._folder = _folder(trainer)
        self._attempt = trainer.strategy.broadcast(uuid4().hex[:8])
        self._folder.mkdir(parents=True, exist_ok=True)
        self._version = trainer.strategy.broadcast(_free_version(self._folder))
        if pl_module.learns or pl_module.held_out is not None:  # else the bank says it, when it is there
            level_of(pl_module.calibration, self.alpha, self.alpha_fdr)
        self._file: BinaryIO = (self._folder / f"{PART}{self._attempt}-{trainer.global_rank}.jsonl").open("wb")
        lock(self._file.fileno())  # others must not take it for one cut short
        self._write([{"identity": self._identity}])

    @override
    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.received_sigterm:  # which Lightning looks for in other loops
            raise SIGTERMException
        if not self._begun:  # the bank is there by now
            self._begun, self._calibration = True, pl_module.calibration
            self._level = level_of(self._calibration, self.alpha, self.alpha_fdr)
            dataset = trainer.predict_dataloaders.dataset  # type: ignore[union-attr]
            shown, self._view = dataset.images, dataset.view
            self._paths, self._names, self._sources = shown.paths(), pl_module.data.names(shown), shown.sources
            self._maps: list[str] = []
        real = (outputs["index"] >= 0).nonzero().flatten()  # of no images there is a filler
        index = outputs["index"][real].tolist()
        if not index:
            return
        reasons = batch.get("unreadable", [""] * len(index))
        found = {kind: value[real] for kind, value in outputs.items()}
        part = results(
            [self._paths[i] for i in index], reasons, found, pl_module.bank_names, self._calibration, self._level
        )
        rows = [{"index": i, **row} for i, row in zip(index, part.rows(), strict=True)]
        if part.maps is not None:
            self._drew = True
            self._maps = self._maps or _map_names(self._names, f"maps{self._version}")
            images = batch["image"][real].permute(0, 2, 3, 1).cpu().numpy()
            for i, row, image, values, reason in zip(index, rows, images, part.maps, reasons, strict=True):
                row["map"] = None if reason else f"{self._maps[i]}.npy"
                if not reason:
                    if own_size(self.map_size, pl_module):
                        image, values = self._sized(self._sources[i], values)
                    self._draw(pl_module, self._folder / self._maps[i], image, values)
        self._write(rows)  # last: a row that is there is not made again

    def _write(self, rows: list[dict[str, Any]]) -> None:
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self._file.flush()
        except OSError as error:
            raise PandaError(
                f"the scores could not be written ({error}). Scores written so far are kept: free disk space and "
                "run the same command again to continue."
            ) from error

    def _sized(
        self, source: Source, values: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """An image (H, W, 3) and its map (H, W) in its own pixels."""
        picture = self._view.open(source).rgb(self._view.intensity)
        return np.asarray(picture), self._view.undone(torch.from_numpy(values), picture.size).numpy()

    @staticmethod
    def _draw(detector: Any, path: Path, image: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(f"{path}.npy", values)
        span = getattr(detector, "value_range", None) or (float(np.nanmin(values)), float(np.nanmax(values)))
        shown = coloured(values, span, image)
        if getattr(detector, "threshold", None) is not None:
            shown = outline(shown, values >= detector.threshold, (255, 255, 255))
        Image.fromarray(shown).save(f"{path}.png")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        for file in self._earlier:
            file.close()
        self._earlier = []
        if hasattr(self, "_file"):
            self._file.close()
            if not self._begun:  # it holds no row
                Path(self._file.name).unlink(missing_ok=True)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.maps = self._drawn_before
        self._file.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._finish()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        for sentence in self._sentences:  # now, when the progress bar no longer draws
            rank_zero_info(sentence)
        self._sentences, self._identity = [], ""

    def _finish(self) -> None:
        """Make the table of the rows of all attempts and processes."""
        parts = [*(Path(file.name) for file in self._earlier), *sorted(self._folder.glob(f"{PART}{self._attempt}-*"))]
        places = _places(parts)
        order = sorted(places)
        if not order:
            raise PandaError("there was nothing to score.")
        p = np.array([np.nan if (v := row["p_value"]) is None else v for row in _rows(places, order)])
        marked = None if self.alpha_fdr is None else benjamini_hochberg(p, self.alpha_fdr)
        bad = anomalous = 0
        jsonl, table = (self._folder / f"predictions{self._version}{ending}" for ending in (".jsonl", ".csv"))
        with new_file(jsonl) as one, _text(one) as lines, new_file(table) as two, _text(two) as file:
            widest = max(_rows(places, order), key=lambda row: len(row.get("neighbours", ())))
            columns = csv.DictWriter(file, list(flat(_decided(widest, self._level, marked, 0))), restval="")
            columns.writeheader()
            for i, row in enumerate(_rows(places, order)):
                self._fetch(row.get("map"), places[order[i]][0].parent)
                decided = _decided(row, self._level, marked, i)
                lines.write(json.dumps(decided) + "\n")
                columns.writerow(flat(decided))
                bad += decided["unreadable"] is not None
                anomalous += decided["anomalous"] is True
        for earlier in self._earlier:
            earlier.truncate(0)  # nobody takes it up between its end and its removal; Windows removes no open file
            earlier.close()
        for part in parts:
            part.unlink(missing_ok=True)
        self._earlier = []
        maps = f", maps to {self._folder / f'maps{self._version}'}" if self._drew else ""
        written = f"Scores written to {table}{maps}"
        self._sentences = [written, *self._said(len(order), bad, anomalous, marked)]
        if bad:
            rank_zero_warn(f"{bad} of {len(order)} images cannot be read; the column unreadable says why.")
        if bad == len(order):
            raise PandaError(f"none of the {bad} images can be read: see {table}.")

    def _fetch(self, name: str | None, folder: Path) -> None:
        """Bring a map that an earlier attempt has drawn here, with its picture."""
        for ending in (".npy", ".png") if name is not None and folder != self._folder else ():
            old, new = (place / Path(str(name)).with_suffix(ending) for place in (folder, self._folder))
            new.parent.mkdir(parents=True, exist_ok=True)
            if old.is_file():  # else it is here already: this attempt, too, was cut short
                old.replace(new)

    def _said(self, count: int, bad: int, anomalous: int, marked: npt.NDArray[np.bool_] | None) -> Iterator[str]:
        """What the decisions mean, and what they do not."""
        calibration = self._calibration
        if calibration is None:
            yield "No p-values and no decisions: to get them, train with data.calibration_fraction=0.2."
            return
        yield f"The p-values are computed from {calibration.words}."
        if self._level is None:
            yield (
                f"No decisions: alpha=0.05 needs 19 calibration images, but there are {len(calibration.scores)}. "
                f"The smallest alpha that they allow is {1 / (len(calibration.scores) + 1):.3g}."
            )
        else:
            yield (
                f"{anomalous} of {count - bad} images are anomalous at alpha={self._level:g}. On average "
                f"{'about' if calibration.kind != 'held out' else 'at most'} {self._level:.1%} of new normal "
                "images are flagged, if they are similar to the calibration images. There is no guarantee for "
                "other images, or for how many of the flagged images are normal (for that see alpha_fdr)."
            )
        if marked is not None and self.alpha_fdr is not None:
            least, n = discoverable(count - bad, len(calibration.scores), self.alpha_fdr), len(calibration.scores)
            possible = f"only be 0 or at least {least}" if least <= count - bad else "only be 0: hold back more images"
            yield (
                f"{marked.sum()} images are marked at alpha_fdr={self.alpha_fdr:g}: on average at most that "
                f"share of them is normal. With {n} calibration images and {count - bad} images to decide on, "
                f"the number of marked images can {possible}."
            )


def _text(path: Path) -> TextIO:
    """A file to write text into, the same bytes on every system."""
    return path.open("w", encoding="utf-8", newline="")


def _free_version(folder: Path) -> str:
    """What the names of a table and its maps end in, so that none is written over: as Lightning counts checkpoints."""
    endings = chain([""], (f"-v{n}" for n in count(1)))
    return next(one for one in endings if not (folder / f"predictions{one}.csv").exists())


def _map_names(names: Sequence[str], folder: str) -> list[str]:
    """Where images' maps are, without ending: below this folder, whatever their own is, each at a place of its own."""
    found: dict[str, None] = {}
    numbers: dict[str, Iterator[int]] = {}
    for name in names:
        own = (part for part in Path(name).parts if part not in (Path(name).anchor, ".."))
        path = place = Path(folder, *own).as_posix()
        while place in found:
            place = f"{path}-{next(numbers.setdefault(path, count(2)))}"
        found[place] = None
    return list(found)


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes


def _taken(part: Path, identity: str) -> BinaryIO | None:
    """A part, open and locked, if its rows are of this identity and no other run writes to it or has taken it."""
    try:
        file = part.open("r+b")
    except OSError:
        return None
    try:
        if lock(file.fileno()) and json.loads(file.readline())["identity"] == identity:
            return file
    except (OSError, ValueError, KeyError, TypeError):
        pass
    file.close()
    return None


def _places(parts: list[Path]) -> dict[int, tuple[Path, int]]:
    """Of each image the file and the place of its row there; a last line that was cut off is none."""
    places: dict[int, tuple[Path, int]] = {}
    for part in parts:
        with part.open("rb") as file:
            start = len(file.readline())
            for line in file:
                if line.endswith(b"\n"):
                    places[json.loads(line)["index"]] = (part, start)
                start += len(line)
    return places


def _rows(places: dict[int, tuple[Path, int]], order: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of these images, read one by one."""
    files = {part: part.open("rb") for part in {part for part, _ in places.values()}}
    try:
        for i in order:
            part, start = places[i]
            files[part].seek(start)
            row = json.loads(files[part].readline())
            del row["index"]
            yield row
    finally:
        for file in files.values():
            file.close()


def _decided(
    row: dict[str, Any], level: float | None, marked: npt.NDArray[np.bool_] | None, place: int
) -> dict[str, Any]:
    """A row with the decisions of this attempt: an earlier one may have had another level."""
    p = row["p_value"]
    row["anomalous"] = None if p is None or level is None else flagged(p, level)
    if marked is None:
        return row
    extra = {"anomalous_fdr": None if p is None else bool(marked[place])}
    before = {key: row.pop(key) for key in list(row)[list(row).index("anomalous") + 1 :]}
    return {**row, **extra, **before}
