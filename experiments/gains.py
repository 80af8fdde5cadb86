"""AUROCs less DN2's on the same images, from recorded rows: RESULTS.md's opening table and by_class.py's pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from panda_lightning.formulas.uncertainty import Estimate, difference
from panda_lightning.tables.rows import Rows

WORD = ", normalised"
RESULTS = Path(__file__).with_name("results")


class Gains:
    """Scores of networks in folders of `panda table`, by method and class; the first folder with such a row counts."""

    def __init__(self, *folders: Path) -> None:
        self.kept: dict[tuple[str, str], dict[str, Any]] = {}
        self.aurocs: dict[tuple[str, str], float] = {}
        for folder in reversed(folders):
            rows = Rows(folder)
            whole = [one for one in rows.read() if one.error is None and "--model.inputs=pixels" not in one.row.words]
            kept = {(one.row.column, one.row.normal): rows.scores(one.row) for one in whole}
            assert len(kept) == len(whole), f"{folder} holds several seeds: this takes one"
            self.kept.update(kept)
            self.aurocs.update({(one.row.column, one.row.normal): one.curve[-1][1] for one in whole})

    def classes(self, column: str) -> list[str]:
        """The normal classes of a method's rows."""
        return sorted(normal for name, normal in self.kept if name == column)

    def mean(self, column: str, classes: list[str]) -> float:
        """The last epochs' mean AUROC."""
        return float(np.mean([self.aurocs[column, normal] for normal in classes]))

    def over(self, base: str, column: str, classes: list[str]) -> Estimate:
        """DeLong's paired difference, of a class or of a mean over classes that share their images."""
        mine, theirs = ([self.kept[name, normal] for normal in classes] for name in (column, base))
        for one, other in zip(mine, theirs, strict=True):
            assert (one["index"] == other["index"]).all()
        one, other = (np.stack([own["score"] for own in side]).astype(np.float64) for side in (mine, theirs))
        return difference(one, other, np.stack([own["label"] for own in mine]))


def table(lines: str) -> str:
    """A Markdown table of the methods in the first line, with two rows for each other line.

    A method may have a heading: `method: heading`. Another line is `data | folder | names | class`: names are what the
    folder calls its methods, with {} for the method; the class is for folders whose classes do not share their images.
    Both may be left out. Methods in several folders: `folder + folder`.
    """
    head, *others = ([part.strip() for part in line.split("|")] for line in lines.strip().splitlines())
    methods = [part.partition(": ")[0] for part in head]
    rows = [["data", "features", "DN2", *(part.partition(": ")[2] or part for part in head)], ["---"] * (len(head) + 3)]
    for data, folder, *rest in others:
        gains = Gains(*(RESULTS / name.strip() for name in folder.split("+")))
        names, only = rest[0] if rest and rest[0] else "{}", rest[1:]
        for kind, end in (("raw", ""), ("normalised", WORD)):
            base = names.format(f"DN2{end}")
            classes = only or gains.classes(base)
            start = f"{100 * gains.mean(base, classes):.2f}"
            cells = [_cell(gains, base, names.format(name + end), classes) for name in methods]
            rows.append([data if not end else "", kind, start, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(gains: Gains, base: str, column: str, classes: list[str]) -> str:
    there = [normal for normal in classes if (column, normal) in gains.kept]
    if not there:
        return "-"
    gain = gains.over(base, column, there)
    value, low, high = (100 * part for part in (gain.value, gain.low, gain.high))
    text = f"**{value:+.1f}**" if low > 0 else f"{value:+.1f}"
    some = "" if there == classes else f" ({len(there)} of {len(classes)})"
    return f"{100 * gains.mean(column, there):.2f}{some}: {text} [{low:.1f}, {high:.1f}]"
