"""What the rows of a table say together: means with intervals, differences, ranks, curves.

Everything is a plain dictionary, for JSON, that all outputs show. AUROCs are fractions, published figures per cent.
"""

import base64
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

from panda_lightning.arguments import subclasses
from panda_lightning.datamodules import AnomalyDataModule
from panda_lightning.formulas import uncertainty
from panda_lightning.formulas.metrics import auroc
from panda_lightning.formulas.uncertainty import Estimate
from panda_lightning.tables.plan import Row
from panda_lightning.tables.rows import Found, Rows

PUBLISHED: dict[str, dict[str, list[dict[str, Any]]]] = yaml.safe_load(
    Path(__file__).with_name("published.yaml").read_text("utf-8")
)
BINS = 40
Summary = dict[str, Any]


class Scored:
    """A run with its scores.

    Attributes:
        found: What came out.
        score: (N,) float64.
        label: (N,), 1 is anomalous.
        kind: (N,), the images' own classes.
    """

    def __init__(self, rows: Rows, found: Found) -> None:
        kept = rows.scores(found.row)
        self.found, self.row = found, found.row
        self.score, self.label, self.kind = kept["score"].astype(np.float64), kept["label"], kept["kind"]

    def measures(self) -> dict[str, float]:
        """What stands beside AUROC."""
        own: dict[str, float] = {
            "average_precision": uncertainty.average_precision(self.score, self.label),
            "fpr_at_95_tpr": uncertainty.fpr_at_tpr(self.score, self.label),
        }
        curve = self.found.curve
        if len(curve) > 1 and curve[0][0] == 0:
            own["start"] = curve[0][1]
        if len(curve) > 1:
            own["oracle"] = max(value for _, value in curve)
        return own


def summary(
    rows: Rows, found: Sequence[Found], plan: Sequence[Row] | None, command: Callable[[list[Row]], str] | None = None
) -> Summary:
    """All that outputs show.

    Args:
        rows: Where scores are.
        found: What has come out.
        plan: What was to come out; None is no more than that.
        command: What runs some rows.
    """
    wanted = [one.row for one in found] if plan is None else plan
    good = [Scored(rows, one) for one in found if one.error is None]
    names = list(dict.fromkeys(row.data for row in wanted))
    sets = [
        _set(rows, name, [r for r in wanted if r.data == name], [s for s in good if s.row.data == name], command)
        for name in names
    ]
    made = list(dict.fromkeys(one.made for one in found))
    failed = [{**dict(zip(("data", "normal", "method", "seed"), one.row.place, strict=True)), "error": one.error}
              for one in found if one.error]  # fmt: skip
    told = {"title": ", ".join(names), "made": made, "sets": sets, "failed": failed, "warnings": _warnings(found),
            "ranks": _over_sets(sets)}  # fmt: skip
    return {key: _steady(value) for key, value in told.items()}


def _warnings(found: Sequence[Found]) -> list[dict[str, Any]]:
    """What runs warned of, once for all runs of a method whose sentences begin alike, but for numbers."""
    alike: dict[tuple[str, str, str], dict[Row, str]] = defaultdict(dict)
    for one in found:
        for said in one.warnings:
            beginning = re.sub(r"[\d.]+", "", said.partition(":")[0])
            alike[one.row.data, one.row.column, beginning].setdefault(one.row, said)
    return [
        {"data": data, "method": method, "runs": len(said), "said": next(iter(said.values()))}
        for (data, method, _), said in alike.items()
    ]


def _steady(value: Any) -> Any:
    """Numbers to 12 digits: a mean of .92225 is then shown alike on machines that add in another order."""
    if isinstance(value, dict):
        return {key: _steady(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_steady(own) for own in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _set(
    rows: Rows, data: str, wanted: list[Row], good: list[Scored], command: Callable[[list[Row]], str] | None
) -> Summary:
    problems = list(dict.fromkeys(row.normal for row in wanted))
    columns = list(dict.fromkeys(row.column for row in wanted))
    of = {column: [one for one in good if one.row.column == column] for column in columns}
    places = {one.row.place for one in good}
    lacking = {c: [r for r in wanted if r.column == c and r.place not in places] for c in columns}
    some = [row for rows_of_column in lacking.values() for row in rows_of_column]
    missing = command(some) if some and command else None  # one for all: what is there is not run again
    turned = any("--data.protocol=leave_one_out" in row.words for row in wanted)  # the published are one against all
    known = {} if turned else PUBLISHED.get(data, {})
    variants = {row.column: row.variant for row in wanted if row.shots is None}
    cells: dict[str, dict[str, Any]] = {
        column: {p: _estimate([s for s in of[column] if s.row.normal == p]) for p in problems} for column in columns
    }
    methods = [
        {
            "name": column,
            "runs": len(of[column]),
            "planned": len(of[column]) + len(lacking[column]),
            "mean": _estimate(of[column]),
            **_over_seeds(of[column]),
            **_means(one.measures() for one in of[column]),
            "seconds": sum(one.found.seconds for one in of[column]) if of[column] else None,
            "published": [
                {**value, "comparable": _comparable(value, data, problems, [s.row.normal for s in of[column]])}
                for value in known.get(variants.get(column, ""), [])
            ],
            "command": missing if lacking[column] else None,
        }
        for column in columns
    ]
    return {
        "data": data,
        "problems": problems,
        "methods": methods,
        "others": [
            {"name": name, "published": [{**v, "comparable": _comparable(v, data, problems, problems)} for v in values]}
            for name, values in known.items()
            if name not in variants.values()
        ],
        "cells": {column: {p: cell for p, cell in cells[column].items() if cell} for column in columns},
        "classes": {
            f"{name}, published": value["classes"]
            for name, values in known.items()
            for value in values
            if "classes" in value
        },
        "kinds": {column: _kinds(of[column]) for column in columns if of[column]},
        "pairs": _pairs([column for column in columns if of[column]], of),
        "ranks": _ranks({c: {p: cell["value"] for p, cell in cells[c].items() if cell} for c in columns}),
        "curves": {column: curves for column in columns if (curves := _curves(of[column]))},
        "shots": _shots(good),
        "histograms": {column: {s.row.normal: _histogram(s) for s in reversed(of[column])} for column in columns},
        "hardest": {column: {s.row.normal: _hardest(rows, s) for s in reversed(of[column])} for column in columns},
    }


def _comparable(value: dict[str, Any], data: str, problems: Sequence[str], run: Sequence[str]) -> float | None:
    """A published figure over the classes that were run; None where it is over others."""
    classes: dict[str, float] = value.get("classes", {})
    if run and set(run) <= set(classes):
        return float(np.mean([classes[normal] for normal in set(run)])) if set(run) < set(classes) else value["value"]
    known = {cls.__name__: cls for cls in subclasses(AnomalyDataModule)}
    whole = known[data].problems()[1] if data in known else ()
    return value["value"] if set(run or problems) == set(whole) else None


def _estimate(some: Sequence[Scored]) -> dict[str, Any] | None:
    """The mean AUROC of runs; those on the same images are taken together."""
    if not some:
        return None
    groups: dict[str, list[Scored]] = defaultdict(list)
    for one in some:
        groups[one.found.images].append(one)
    parts = [(uncertainty.interval(*_stacked(group)), len(group)) for group in groups.values()]
    return _told(uncertainty.joined(parts)) | {"seeds": len({one.row.seed for one in some})}


def _stacked(some: Sequence[Scored]) -> tuple[Any, Any]:
    """Scores and labels (K, N)."""
    return np.stack([one.score for one in some]), np.stack([one.label for one in some])


def _told(estimate: Estimate) -> dict[str, Any]:
    return {key: getattr(estimate, key) for key in ("value", "low", "high", "reliable")}


def _over_seeds(some: Sequence[Scored]) -> dict[str, Any]:
    """How many seeds, and the standard deviation of the mean over normal classes between them."""
    means = _by_seed(some)
    return {"seeds": len(means), "sd": float(np.std(means, ddof=1)) if len(means) > 1 else None}


def _by_seed(some: Sequence[Scored]) -> list[float]:
    """Means over normal classes, of those seeds that have all of them."""
    normals = {one.row.normal for one in some}
    values: dict[int, list[float]] = defaultdict(list)
    for one in some:
        values[one.row.seed].append(one.found.auroc or 0.0)
    return [float(np.mean(own)) for own in values.values() if len(own) == len(normals)]


def _means(measures: Iterable[dict[str, float]]) -> dict[str, float | None]:
    every = list(measures)
    keys = ("average_precision", "fpr_at_95_tpr", "start", "oracle")
    return {
        key: float(np.mean([one[key] for one in every])) if every and all(key in one for one in every) else None
        for key in keys
    }


def _kinds(some: Sequence[Scored]) -> dict[str, float]:
    """AUROC of each kind of anomaly against the normal images, the mean over runs."""
    found: dict[str, list[float]] = defaultdict(list)
    separate = len({one.found.images for one in some}) > 1  # then a word may be another kind in another category
    for one in some:
        normal = one.label == 0
        for kind in np.unique(one.kind[~normal]):
            chosen = normal | (one.kind == kind)
            name = f"{one.row.normal}, {kind}" if separate else str(kind)
            score, label = (torch.from_numpy(part[chosen]) for part in (one.score, one.label))
            found[name].append(auroc(score, label))
    return {kind: float(np.mean(values)) for kind, values in sorted(found.items())}


def _pairs(columns: Sequence[str], of: Mapping[str, list[Scored]]) -> list[dict[str, Any]]:
    """Each method against each, on the classes and seeds that both have: paired by image, Holm's correction."""
    found: list[dict[str, Any]] = []
    raw = []
    shots = {column: own[0].row.shots for column, own in of.items() if own}
    for one, other in combinations(columns, 2):
        if shots[one] != shots[other]:  # no question that anybody asks, and Holm would count it
            continue
        mine, theirs = ({(s.row.normal, s.row.seed): s for s in of[column]} for column in (one, other))
        groups: dict[str, list[tuple[Scored, Scored]]] = defaultdict(list)
        for key in mine.keys() & theirs.keys():
            if mine[key].found.images == theirs[key].found.images:
                groups[mine[key].found.images].append((mine[key], theirs[key]))
        parts = []
        for pairs in groups.values():
            (first, label), (second, _) = (_stacked([pair[i] for pair in pairs]) for i in (0, 1))
            parts.append((uncertainty.difference(first, second, label), len(pairs)))
        if parts:
            gap = uncertainty.joined(parts, bounded=False)
            found.append({"one": one, "other": other, **_told(gap)})
            raw.append(2 * float(stats.norm.sf(abs(gap.value) / gap.error)) if gap.error else 1.0)
    for pair, p in zip(found, uncertainty.holm(np.array(raw)), strict=True):
        pair["p"] = float(p)
    return found


def _ranks(values: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """Average ranks of the methods that have all problems, and whether they differ."""
    problems = list(dict.fromkeys(p for own in values.values() for p in own))
    methods = [column for column, own in values.items() if len(own) == len(problems)]
    if len(problems) < 2 or len(methods) < 2:
        return None
    table = np.array([[values[column][p] for column in methods] for p in problems])
    found = uncertainty.friedman(table)
    return {
        "methods": methods,
        "average": found.ranks.tolist(),
        "problems": len(problems),
        "f": None if np.isinf(found.f) else found.f,
        "p": found.p,
        "critical_difference": uncertainty.nemenyi_difference(len(methods), len(problems)),
        "wilcoxon": uncertainty.wilcoxon_holm(table).tolist(),
    }


def _over_sets(sets: Sequence[Summary]) -> dict[str, Any] | None:
    """Ranks of methods over data sets, by their means."""
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for one in sets:
        for method in one["methods"]:
            if method["mean"] and method["runs"] == method["planned"]:
                values[method["name"]][one["data"]] = method["mean"]["value"]
    return _ranks(values)


def _curves(some: Sequence[Scored]) -> dict[str, Any]:
    """AUROC over epochs, for each normal class and, under "", over all: mean over seeds, and their range."""
    curves: dict[str, dict[int, dict[float, float]]] = defaultdict(dict)
    for one in some:
        curves[one.row.normal][one.row.seed] = dict(one.found.curve)
    found = {normal: _band(list(own.values())) for normal, own in curves.items()}
    seeds = set.intersection(*(set(own) for own in curves.values())) if curves else set()
    means = []
    for seed in sorted(seeds):
        epochs = _common([own[seed] for own in curves.values()])
        means.append({e: float(np.mean([own[seed][e] for own in curves.values()])) for e in epochs})
    shown = {**found, "": _band(means)} if means else found
    return shown if any(len(band["epochs"]) > 1 for band in shown.values()) else {}


def _common(curves: Sequence[Mapping[float, float]]) -> list[float]:
    """Epochs that all curves have."""
    return sorted(set.intersection(*(set(curve) for curve in curves)))


def _band(curves: Sequence[Mapping[float, float]]) -> dict[str, Any]:
    epochs = _common(curves)
    values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
    ends = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    return {"epochs": epochs, **{key: end.tolist() for key, end in ends.items()}, "seeds": len(curves)}


def _shots(good: Sequence[Scored]) -> dict[str, list[dict[str, Any]]]:
    """Each method's mean AUROC over the number of shots; the interval is Student's over seeds, or that of images."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for shots, method in sorted({(s.row.shots, s.row.method) for s in good if s.row.shots is not None}):
        some = [one for one in good if (one.row.shots, one.row.method) == (shots, method)]
        point, means = _estimate(some) or {}, _by_seed(some)
        if len(means) > 1:
            value, half = np.mean(means), stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
            point |= {"value": float(value), "low": float(value - half), "high": min(1.0, float(value + half))}
        found[method].append({"shots": shots, **point, "seeds": len(means)})
    return dict(found)


def _histogram(one: Scored) -> dict[str, list[float]]:
    """Counts of scores; the few that lie far above the others are counted in the last bin."""
    low, high = float(one.score.min()), float(np.quantile(one.score, 0.995))
    edges = np.linspace(low, max(high, low + 1e-12 + 1e-6 * abs(low)), BINS + 1)
    normal, anomalous = (np.histogram(one.score[one.label == k].clip(max=edges[-1]), edges)[0] for k in (0, 1))
    return {"edges": edges.tolist(), "normal": normal.tolist(), "anomalous": anomalous.tolist()}


def _hardest(rows: Rows, one: Scored) -> dict[str, list[dict[str, Any]]]:
    """Anomalies that pass for normal, and normal images that do not; nothing where the pictures are not here."""
    kept = rows.hardest(one.row)
    found: dict[str, list[dict[str, Any]]] = {"missed": [], "false_alarms": []}
    for place, jpeg in zip(kept.get("place", ()), kept.get("jpeg", ()), strict=True):
        anomalous = one.label[place] == 1
        others = one.score[one.label != one.label[place]]
        beaten = (others > one.score[place]).mean() if anomalous else (others < one.score[place]).mean()
        picture = f"data:image/jpeg;base64,{base64.b64encode(bytes(jpeg)).decode()}"
        told = {"picture": picture, "kind": str(one.kind[place]), "beaten": float(beaten)}
        found["missed" if anomalous else "false_alarms"].append(told)
    return found if kept else {}
