"""Draw AUROC over epochs: python experiments/curves.py FOLDER writes FOLDER/curves.png.

FOLDER holds the rows of a `panda table`. A panel is a class, with raw features above and normalised ones below; a line
is a method, dotted where it does not train. More than three classes become one panel: the mean of the methods that have
all classes, at the epochs that all of them have.
"""

import sys
from itertools import cycle
from pathlib import Path

import numpy as np
from gains import WORD
from matplotlib import colormaps
from matplotlib.figure import Figure

from panda_lightning.tables.rows import Rows


def draw(folder: Path) -> None:
    """Draw the picture of a folder of rows."""
    curves = {}
    for one in (one for one in Rows(folder).read() if one.error is None):
        name = one.row.column.removesuffix(f", {one.row.shots}-shot")
        curves[one.row.normal, WORD in name, name.removesuffix(WORD)] = one.curve
    classes = sorted({normal for normal, _, _ in curves})
    if len(classes) > 3:
        curves, classes = means(curves, classes)
    spaces = sorted({space for _, space, _ in curves})
    names = sorted({name for _, _, name in curves})
    shades = dict(zip(names, cycle(colormaps["tab10"].colors), strict=False))
    figure = Figure(figsize=(max(4 * len(classes), 6) + 1.5, 3 * len(spaces)), layout="constrained")
    grid = figure.subplots(len(spaces), len(classes), squeeze=False, sharex=True)
    for space, line in zip(spaces, grid, strict=True):
        for normal, axes in zip(classes, line, strict=True):
            for name in (name for name in names if (normal, space, name) in curves):
                epochs, values = zip(*curves[normal, space, name], strict=True)
                if len(values) > 1:
                    axes.plot(epochs, [100 * value for value in values], ".-", color=shades[name], label=name)
                else:
                    axes.axhline(100 * values[0], color=shades[name], ls=":", label=name)
            axes.set_title(f"{normal}{WORD if space else ', raw'}", loc="left")
            axes.grid(alpha=0.25)
        line[0].set_ylabel("AUROC in per cent")
    for axes in grid[-1]:
        axes.set_xlabel("epochs")
    lines = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = sorted(lines)
    figure.legend([lines[name] for name in shown], shown, loc="outside right upper", frameon=False)
    figure.savefig(folder / "curves.png", dpi=110)


def means(curves, classes):
    """The mean over all classes, in place of the classes."""
    found, title = {}, f"mean of {len(classes)} classes"
    for space, name in {(space, name) for _, space, name in curves}:
        own = [dict(curves[normal, space, name]) for normal in classes if (normal, space, name) in curves]
        if len(own) == len(classes):
            epochs = sorted(set.intersection(*map(set, own)))
            found[title, space, name] = [(epoch, np.mean([one[epoch] for one in own])) for epoch in epochs]
    return found, [title]


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
