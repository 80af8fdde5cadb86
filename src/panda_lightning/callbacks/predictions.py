"""What ``lightning predict`` leaves behind: a table of scores, and anomaly maps."""

import csv
import fcntl
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from typing_extensions import override

from panda_lightning.arguments import Checked, OpenShare
from panda_lightning.callbacks.anomaly_maps import coloured, outline
from panda_lightning.formulas.conformal import benjamini_hochberg, discoverable, flagged
from panda_lightning.runtime.fingerprint import fingerprint
from panda_lightning.runtime.results import Calibration, flat, level_of, results
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import Batch, PandaError

PART = "predictions.part-"  # files of rows as they come: one of each process of each attempt


class Predictions(Checked, pl.Callback):
    """Writes a row an image, in the data set's order, to predictions.csv and predictions.jsonl in the run's folder.

    A row has path, score, p_value, anomalous, the nearest normal images with their distances, and why an image cannot
    be read, if so (runtime/results.py). Rows are written as they come, so that memory does not grow with their number.
    Where a run on loose images was cut short, the same command goes on from what is in the log's other folders.

    From a detector with maps, ``maps/<path>.npy`` holds the map, (H, W) float32, and ``maps/<path>.png`` the image
    under its colours, which span the maps of the test that saved the checkpoint, or else this map; the outline is that
    test's threshold of best F1 (oracle). <path> has its ending (``maps/cam.png.npy``), since ``cam.jpg`` may lie beside
    ``cam.png``.

    Args:
        alpha: An image is anomalous where its p-value is no larger; None is .05, where the calibration allows it.
        alpha_fdr: Mark in ``anomalous_fdr`` images of which at most this share is normal, on average: Benjamini and
            Hochberg over the p-values of the finished table.
        maps: Draw for DN2, PANDA and MSC how each distance is made up over the image.
    """

    def __init__(self, alpha: OpenShare | None = None, alpha_fdr: OpenShare | None = None, maps: bool = False) -> None:
        self.alpha = alpha
        self.alpha_fdr = alpha_fdr
        self.maps = maps
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
        self._identity = fingerprint(detector.scored_by, detector.origin, images.fingerprint(), self.maps)
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
        self._file: BinaryIO = (self._folder / f"{PART}{self._attempt}-{trainer.global_rank}.jsonl").open("wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # others must not take it for one cut short
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
            shown = trainer.predict_dataloaders.dataset.images  # type: ignore[union-attr]
            self._paths, self._names = shown.paths(), pl_module.data.names(shown)
        real = (outputs["index"] >= 0).nonzero().flatten()  # of no images there is a filler
        index = outputs["index"][real].tolist()
        if not index:
            return
        reasons = batch.get("unreadable", [""] * len(index))
        found = {kind: value[real] for kind, value in outputs.items()}
        part = results(
            [self._paths[i] for i in index], reasons, found, pl_module.bank_names, self._calibration, self._level
        )
        self._write([{"index": i, **row} for i, row in zip(index, part.rows(), strict=True)])
        if part.maps is not None:
            images = batch["image"][real].permute(0, 2, 3, 1).cpu().numpy()
            for i, image, values, reason in zip(index, images, part.maps, reasons, strict=True):
                if not reason:
                    self._draw(pl_module, self._names[i], image, values)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self._file.flush()
        except OSError as error:
            raise PandaError(
                f"the scores could not be written ({error}). What was written stays: make room and give the same "
                "command again, which then goes on."
            ) from error

    def _draw(self, detector: Any, name: str, image: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> None:
        self._drew = True
        path = self._folder / "maps" / Path(*(part for part in Path(name).parts if part not in ("/", "..")))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(f"{path}.npy", values)
        span = getattr(detector, "value_range", None) or (float(values.min()), float(values.max()))
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
        jsonl, table = self._folder / "predictions.jsonl", self._folder / "predictions.csv"
        with new_file(jsonl) as one, one.open("w") as lines, new_file(table) as two, two.open("w", newline="") as file:
            widest = max(_rows(places, order), key=lambda row: len(row.get("neighbours", ())))
            columns = csv.DictWriter(file, list(flat(_decided(widest, self._level, marked, 0))), restval="")
            columns.writeheader()
            for i, row in enumerate(_rows(places, order)):
                decided = _decided(row, self._level, marked, i)
                lines.write(json.dumps(decided) + "\n")
                columns.writerow(flat(decided))
                bad += decided["unreadable"] is not None
                anomalous += decided["anomalous"] is True
        for part in parts:
            part.unlink(missing_ok=True)
        for earlier in self._earlier:
            earlier.close()
        self._earlier = []
        written = f"Scores written to {table}" + (f", maps to {self._folder / 'maps'}" if self._drew else "")
        self._sentences = [written, *self._said(len(order), bad, anomalous, marked)]
        if bad:
            rank_zero_warn(f"{bad} of {len(order)} images cannot be read; the column unreadable says why.")
        if bad == len(order):
            raise PandaError(f"none of the {bad} images can be read: see {table}.")

    def _said(self, count: int, bad: int, anomalous: int, marked: npt.NDArray[np.bool_] | None) -> Iterator[str]:
        """What the decisions mean, and what they do not."""
        calibration = self._calibration
        if calibration is None:
            yield "No p-values: train with data.calibration_fraction=0.2 to have them, and decisions."
            return
        yield f"The p-values rest on {calibration.words}."
        if self._level is None:
            yield (
                f"No decisions: alpha=0.05 needs 19 calibration images, and there are {len(calibration.scores)}: the "
                f"least alpha that they allow is {1 / (len(calibration.scores) + 1):.3g}."
            )
        else:
            yield (
                f"{anomalous} of {count - bad} images are anomalous at alpha={self._level:g}. Of new normal images, "
                f"{'about' if calibration.kind != 'held out' else 'at most'} {self._level:.1%} are flagged on average, "
                "if they are like those of the calibration. Nothing is promised about other images, nor about how many "
                "of the flagged are normal (for that see alpha_fdr)."
            )
        if marked is not None and self.alpha_fdr is not None:
            least, n = discoverable(count - bad, len(calibration.scores), self.alpha_fdr), len(calibration.scores)
            possible = f"either none or at least {least}" if least <= count - bad else "none: hold more images back"
            yield (
                f"{marked.sum()} are discoveries at alpha_fdr={self.alpha_fdr:g}: at most that share of them is "
                f"normal, on average. With {n} calibration images and {count - bad} to decide on there are {possible}."
            )


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes


def _taken(part: Path, identity: str) -> BinaryIO | None:
    """A part, open and locked, if its rows are of this identity and no other run writes to it or has taken it."""
    try:
        file = part.open("r+b")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if json.loads(file.readline())["identity"] == identity:
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
