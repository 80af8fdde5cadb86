"""What scoring gives: numbers of images by name, and the decision that a calibration allows."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from panda_lightning.arguments import OpenShare, require
from panda_lightning.formulas.conformal import benjamini_hochberg, flagged, p_values, require_alpha
from panda_lightning.runtime.whole import new_file
from panda_lightning.types import PandaError

ALPHA = 0.05  # where none is asked for


@dataclass(frozen=True)
class Calibration:
    """Scores of normal images that a detector was not trained on; they show how rare a score is.

    Attributes:
        scores: (n,).
        kind: held out, or leave one out: scores of the images in the bank, each without itself (approximate).
    """

    scores: npt.NDArray[np.float64]
    kind: str

    def level(self, alpha: float | None) -> float | None:
        """The level to decide at: what is asked for, else .05, or None where so few images do not allow that.

        Raises:
            PandaError: If what is asked for is not possible.
        """
        if alpha is not None:
            require_alpha(alpha, len(self.scores))
            return alpha
        return ALPHA if ALPHA * (len(self.scores) + 1) >= 1 else None

    @property
    def words(self) -> str:
        """What it is, for people."""
        approximate = ", approximate" if self.kind != "held out" else ""
        return f"{len(self.scores)} normal images {self.kind}{approximate}"


@dataclass(frozen=True)
class Results:
    """Scores of images, in their order, one row per image.

    Attributes:
        names: Paths, or numbers of pictures in memory.
        score: (N,), higher is more anomalous; NaN if an image cannot be read.
        p_value: (N,) conformal p-values; None without calibration.
        anomalous: (N,) whether p_value <= alpha; None without calibration.
        neighbours: Names of the nearest normal images, (N, n), "" for an unreadable image; None if the method has no
            bank of images.
        distances: Distances to these neighbours, (N, n), ascending, as the method's score uses them.
        maps: (N, H, W) float32, or a list of N (H, W) if sizes differ; None if there are none.
        unreadable: Why an image cannot be read, or "".
        others: Other scores by name, (N,) each: ses_score, from SampleWiseEarlyStopping.
        alpha: The level of the decision.
        calibration: The calibration from which the p-values are computed.
    """

    names: list[str]
    score: npt.NDArray[np.float64]
    p_value: npt.NDArray[np.float64] | None
    anomalous: npt.NDArray[np.bool_] | None
    neighbours: npt.NDArray[np.str_] | None
    distances: npt.NDArray[np.float64] | None
    maps: npt.NDArray[np.float32] | list[npt.NDArray[np.float32]] | None
    unreadable: list[str]
    others: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    alpha: float | None = None
    calibration: str = "none"

    def __len__(self) -> int:
        return len(self.names)

    def discoveries(self, level: OpenShare) -> npt.NDArray[np.bool_]:
        """Which images (N,) are discoveries by Benjamini and Hochberg: at most ``level`` of them false on average."""
        require("level", level, OpenShare)
        if self.p_value is None:
            raise PandaError("there are no p-values: train with data.calibration_fraction.")
        return benjamini_hochberg(self.p_value, level)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A dictionary an image, for JSON: what does not apply is None."""
        for i, name in enumerate(self.names):
            bad = bool(self.unreadable[i])
            row: dict[str, Any] = {"path": name, "score": None if bad else float(self.score[i])}
            row |= {kind: None if bad else float(values[i]) for kind, values in self.others.items()}
            row["p_value"] = None if bad or self.p_value is None else float(self.p_value[i])
            row["anomalous"] = None if bad or self.anomalous is None else bool(self.anomalous[i])
            if self.neighbours is not None and self.distances is not None:
                pairs = zip(self.neighbours[i].tolist(), self.distances[i].tolist(), strict=True)
                row["neighbours"] = [] if bad else [{"path": n, "distance": d} for n, d in pairs if n]
            row["unreadable"] = self.unreadable[i] or None
            yield row

    def save(self, path: str | Path) -> None:
        """Write a table: JSON lines where the name ends in .jsonl, CSV where it ends in .csv.

        Raises:
            PandaError: If it ends otherwise.
        """
        kind = Path(path).suffix.lower()
        if kind not in (".csv", ".jsonl"):
            raise PandaError(f"{path} is neither .csv nor .jsonl: choose one of these endings.")
        with new_file(Path(path)) as part, part.open("w", encoding="utf-8", newline="") as file:
            if kind == ".jsonl":
                file.writelines(json.dumps(row) + "\n" for row in self.rows())
                return
            rows = [flat(row) for row in self.rows()]
            table = csv.DictWriter(file, max(rows, key=len), restval="")
            table.writeheader()
            table.writerows(rows)


def joined(parts: Sequence[Results], rows: Sequence[int]) -> Results:
    """The results of several batches as one, in the order of their rows."""
    first, order = parts[0], np.argsort(rows)
    found: dict[str, Any] = {"alpha": first.alpha, "calibration": first.calibration}
    for name in (column.name for column in fields(Results) if column.name not in found):
        columns = [getattr(part, name) for part in parts]
        if columns[0] is None:
            found[name] = None
        elif name == "maps" and len({values.shape for column in columns for values in column}) == 1:
            found[name] = np.concatenate(columns)[order]
        elif name == "maps" or isinstance(columns[0], list):
            values = [value for column in columns for value in column]
            found[name] = [values[i] for i in order]
        elif isinstance(columns[0], dict):
            found[name] = {key: np.concatenate([column[key] for column in columns])[order] for key in columns[0]}
        else:
            found[name] = np.concatenate(columns)[order]
    return Results(**found)


def level_of(calibration: Calibration | None, alpha: float | None, fdr: float | None = None) -> float | None:
    """The level at which to decide, None for no decision.

    Raises:
        PandaError: If a level is asked for that the calibration does not allow.
    """
    if calibration is not None:
        if fdr is not None:
            require_alpha(fdr, len(calibration.scores), "alpha_fdr")
        return calibration.level(alpha)
    if alpha is not None or fdr is not None:
        asked = f"alpha_fdr={fdr:g}" if alpha is None else f"alpha={alpha:g}"
        raise PandaError(
            f"{asked} needs a calibration, but this detector has none: train it with "
            "data.calibration_fraction=0.2, which holds back that share of the normal training images."
        )
    return None


def results(
    names: list[str],
    unreadable: Sequence[str],
    found: dict[str, Any],
    normal_names: list[str],
    calibration: Calibration | None,
    level: float | None,
) -> Results:
    """What a detector said of a batch, a row an image.

    Args:
        names: Of the images.
        unreadable: For each the reason why it cannot be read, or "".
        found: See Detector.explained; other scores beside it become columns.
        normal_names: What the normal images are called, if that is known.
        calibration: For p-values.
        level: See level_of.
    """
    values = found["score"].cpu().double().numpy().copy()
    bad = np.array([bool(reason) for reason in unreadable], dtype=np.bool_)
    values[bad] = np.nan
    p = None if calibration is None else p_values(calibration.scores, values)
    neighbours = distances = None
    if "neighbour" in found:
        rows = found["neighbour"].cpu().numpy()
        neighbours = np.array([[normal_names[i] if normal_names else str(i) for i in row] for row in rows])
        distances = found["distance"].cpu().double().numpy().copy()
        neighbours[bad], distances[bad] = "", np.nan
    maps = found["map"].float().cpu().numpy().copy() if "map" in found else None
    if maps is not None:
        maps[bad] = np.nan
    return Results(
        names=list(names),
        score=values,
        p_value=p,
        anomalous=None if p is None or level is None else flagged(p, level),
        neighbours=neighbours,
        distances=distances,
        maps=maps,
        unreadable=list(unreadable),
        others={k: v.cpu().double().numpy() for k, v in found.items() if k.endswith("_score")},
        alpha=level,
        calibration="none" if calibration is None else calibration.words,
    )


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for CSV: a column for each neighbour and each distance, empty where there is nothing."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key == "neighbours":
            for i, near in enumerate(value, 1):
                flat |= {f"neighbour_{i}": near["path"], f"distance_{i}": near["distance"]}
        else:
            flat[key] = "" if value is None else value
    return flat
