"""A summary as Markdown, LaTeX, one HTML page, and a CSV with a line a run."""

import csv
import json
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from panda_lightning.formulas import uncertainty
from panda_lightning.tables.rows import Found, Rows
from panda_lightning.tables.summary import Scored, Summary

MANY = 5  # methods, beyond which Markdown compares only the first with the others
PAGE = Path(__file__).with_name("page.html")
COLUMNS = (
    "data", "normal_class", "method", "seed", "shots", "auroc", "low", "high", "reliable", "average_precision",
    "fpr_at_95_tpr", "auroc_at_0_epochs", "best_epoch_oracle", "epochs", "seconds", "made", "command", "warnings",
    "error",
)  # fmt: skip
HOW = (
    "AUROC in per cent. In brackets 95 % intervals over test images: DeLong's standard error, on the scale of logits; "
    "classes and seeds share the images; the interval leaves out what seeds change. (!): not reliable, since too few "
    "images are ranked wrong. Differences: DeLong, paired by image; p by Holm over the pairs of a data set."
)


def lines(rows: Rows, found: Sequence[Found]) -> list[dict[str, Any]]:
    """A line a run, with the columns above."""
    made = []
    for one in found:
        row = one.row
        line: dict[str, Any] = {"data": row.data, "normal_class": row.normal, "method": row.method, "seed": row.seed}
        line |= {"shots": row.shots, "seconds": round(one.seconds, 1), "made": one.made, "command": row.command}
        line |= {"error": one.error, "warnings": " ".join(one.warnings) or None}
        if one.error is None:
            scored = Scored(rows, one)
            sure, own = uncertainty.interval(scored.score, scored.label), scored.measures()
            line |= {"auroc": sure.value, "low": sure.low, "high": sure.high, "reliable": sure.reliable}
            line |= {"auroc_at_0_epochs": own.pop("start", None), "best_epoch_oracle": own.pop("oracle", None), **own}
            line |= {"epochs": one.curve[-1][0]}
        made.append({column: line.get(column) for column in COLUMNS})
    return made


def as_csv(table: Sequence[dict[str, Any]]) -> str:
    """The lines as CSV."""
    file = StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()


def page(summary: Summary) -> str:
    """One HTML page that holds all it shows."""
    content = json.dumps(summary, ensure_ascii=True).replace("<", "\\u003c")
    return PAGE.read_text("utf-8").replace("/*CONTENT*/", content)


def markdown(summary: Summary, how: str = HOW) -> str:
    """The tables for people who read text, with how numbers are made."""
    text: list[str] = []
    for one in summary["sets"]:
        lost = {(f["normal"], f["method"]) for f in summary["failed"] if f["data"] == one["data"]}
        text += [f"## {one['data']}", "", *_means(one, lost), "", *_classes(one, lost), *_pairs(one)]
        text += _ranks(one["ranks"])
        text += [*_kinds(one), *_commands(one), ""]
    if summary["ranks"]:
        text += ["## Over data sets", *_ranks(summary["ranks"]), ""]
    if summary["failed"]:
        failed = [f"- {', '.join(map(str, list(f.values())[:3]))}, seed {f['seed']}: {f['error']}"
                  for f in summary["failed"]]  # fmt: skip
        text += ["Failed (--again true runs them again):", "", *failed, ""]
    if summary["warnings"]:
        warned = [f"- {w['data']}, {w['method']}, {_runs(w['runs'])}: {w['said']}" for w in summary["warnings"]]
        text += ["Warnings:", "", *warned, ""]
    made = f"Made by {'; '.join(summary['made'])}." if summary["made"] else "No runs yet."
    return "\n".join([*text, *([how, ""] if how else []), made])


def percent(told: dict[str, Any] | None, interval: bool = True, failed: bool = False) -> str:
    """An AUROC with its interval."""
    if told is None:
        return "failed" if failed else "not run"
    mark = "" if told["reliable"] else " (!)"
    ends = f" [{100 * told['low']:.2f}, {100 * told['high']:.2f}]{mark}" if interval else ""
    return f"{100 * told['value']:.2f}{ends}"


def _optional(value: float | None, form: str = ".2f", scale: float = 100) -> str:
    return "" if value is None else format(scale * value, form)


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs, such as"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _table(heads: Sequence[str], body: Sequence[Sequence[object]]) -> list[str]:
    return [_row(heads), "|---" * len(heads) + "|", *map(_row, body)]


def _means(one: Summary, lost: set[tuple[str, str]]) -> list[str]:
    oracle = any(method["oracle"] is not None for method in one["methods"])
    heads = [
        "method",
        "runs",
        "mean",
        "seeds (sd)",
        "published",
        "difference",
        "before training",
        "AP",
        "FPR at 95 % TPR",
    ]
    heads += ["best epoch (oracle)"] if oracle else []
    body = []
    for method in one["methods"]:
        mean, known = method["mean"], method["published"]
        alike = [value["comparable"] for value in known if value["comparable"] is not None]
        gaps = [f"{100 * mean['value'] - value:+.2f}" for value in alike] if mean else []
        runs = method["runs"] if method["runs"] == method["planned"] else f"{method['runs']} of {method['planned']}"
        spread = f"{method['seeds']} ({_optional(method['sd'])})" if method["sd"] is not None else method["seeds"]
        failed = method["name"] in {name for _, name in lost}
        cells = [method["name"], runs, percent(mean, failed=failed), spread, _published(known), ", ".join(gaps)]
        cells += [_optional(method[key]) for key in ("start", "average_precision", "fpr_at_95_tpr")]
        body.append([*cells, _optional(method["oracle"])] if oracle else cells)
    empty = [""] * (len(heads) - 5)
    body += [
        [f"{other['name']}, published", "", "", "", _published(other["published"]), *empty] for other in one["others"]
    ]
    return _table(heads, body)


def _published(values: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{value['value']:g}{_over(value)}" for value in values)


def _over(value: dict[str, Any]) -> str:
    """What a published figure is over, where that is not what was run."""
    comparable = value.get("comparable", value["value"])
    if comparable == value["value"]:
        return ""
    return " (all classes)" if comparable is None else f" ({comparable:.2f} on these classes)"


def _classes(one: Summary, lost: set[tuple[str, str]]) -> list[str]:
    if not any(one["cells"].values()):
        return []
    names = [method["name"] for method in one["methods"]]
    body = [
        [
            problem,
            *(percent(one["cells"][name].get(problem), False, (problem, name) in lost) for name in names),
            *(classes.get(problem, "") for classes in one["classes"].values()),
        ]
        for problem in one["problems"]
    ]
    return _table(["normal class", *names, *one["classes"]], body)


def _pairs(one: Summary) -> list[str]:
    body, first = [], one["methods"][0]["name"]
    few = len(one["methods"]) <= MANY
    for pair in (p for p in one["pairs"] if few or first in (p["one"], p["other"])):
        gap, ends = 100 * pair["value"], f"{100 * pair['low']:+.2f}, {100 * pair['high']:+.2f}"
        mark = "" if pair["reliable"] else " (!)"
        body.append([f"{pair['one']} - {pair['other']}", f"{gap:+.2f} [{ends}]{mark}", _p(pair["p"])])
    rest = [] if few else ["", "The other pairs, which count in Holm's correction, are in table.html."]
    return ["", *_table(["pair", "difference of means", "p (Holm)"], body), *rest] if body else []


def _ranks(ranks: dict[str, Any] | None) -> list[str]:
    if ranks is None:
        return []
    order = sorted(range(len(ranks["methods"])), key=lambda i: ranks["average"][i])
    listed = ", ".join(f"{ranks['methods'][i]} {ranks['average'][i]:.2f}" for i in order)
    pairs = [(ranks["wilcoxon"][i][j], f"{ranks['methods'][i]} - {ranks['methods'][j]}") for i in order for j in order
             if i < j]  # fmt: skip
    lowest = ", ".join(f"{name} {_p(p)}" for p, name in sorted(pairs)[:3])
    f = "infinite" if ranks["f"] is None else f"{ranks['f']:.3g}"
    return [
        "",
        f"Average ranks over {ranks['problems']} problems (1 is best): {listed}. Friedman with Iman and Davenport's "
        f"F {f}, p {_p(ranks['p'])}; critical difference by Nemenyi {ranks['critical_difference']:.2f}; smallest p of "
        f"Wilcoxon with Holm: {lowest}.",
    ]


def _kinds(one: Summary) -> list[str]:
    kinds = sorted({kind for own in one["kinds"].values() for kind in own})
    if len(kinds) < 2:
        return []
    body = [[kind, *(_optional(own.get(kind)) for own in one["kinds"].values())] for kind in kinds]
    return ["", *_table(["kind of anomaly", *one["kinds"]], body)]


def _commands(one: Summary) -> list[str]:
    lacking: dict[str, list[str]] = {}
    for method in one["methods"]:
        if method["command"]:
            lacking.setdefault(method["command"], []).append(method["name"])
    said = [f"- {'; '.join(names)}: `{command}`" for command, names in lacking.items()]
    return ["", "Not run:", "", *said] if said else []


def latex(summary: Summary) -> str:
    """A table a data set for papers, with the package booktabs: classes, means with intervals, published figures."""
    parts = ["% needs \\usepackage{booktabs}"]
    for one in summary["sets"]:
        methods = one["methods"]
        cells = [[_tex(p), *(_cell(one, m["name"], p) for m in methods)] for p in one["problems"]]
        means = ["mean", *(percent(m["mean"], interval=False) if m["mean"] else "--" for m in methods)]
        ends = ["95\\,\\%", *(_ends(m["mean"]) for m in methods)]
        alike = ([v for v in m["published"] if v["comparable"] == v["value"]] for m in methods)
        known = ["published", *(_published(values) or "--" for values in alike)]
        body = [" & ".join(row) + r" \\" for row in cells]
        foot = [" & ".join(row) + r" \\" for row in (means, ends, known)]
        head = " & ".join(["", *(_tex(m["name"]) for m in methods)]) + r" \\"
        parts += [
            f"% {one['data']}: AUROC in per cent", rf"\begin{{tabular}}{{l{'r' * len(methods)}}}", r"\toprule", head,
            r"\midrule", *body, r"\midrule", *foot, r"\bottomrule", r"\end{tabular}", "",
        ]  # fmt: skip
    return "\n".join(parts)


def _cell(one: Summary, method: str, problem: str) -> str:
    """A class's AUROC, bold where it is the best of the row."""
    row = {name: round(cells[problem]["value"], 4) for name, cells in one["cells"].items() if problem in cells}
    if method not in row:
        return "--"
    text = f"{100 * row[method]:.2f}"
    return rf"\textbf{{{text}}}" if row[method] == max(row.values()) and len(row) > 1 else text


def _ends(mean: dict[str, Any] | None) -> str:
    return f"{{}}[{100 * mean['low']:.2f}, {100 * mean['high']:.2f}]" if mean else "--"


def _tex(text: str) -> str:
    """Text with what LaTeX takes for commands."""
    known = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", '"': "''", "--": "-{}-"}
    return re.sub(r'--|[\\&%$#_{}~^"]', lambda found: known.get(found[0], "\\" + found[0]), text)
