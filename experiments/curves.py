"""Draw AUROC over epochs: python experiments/curves.py FOLDER writes FOLDER/curves.png.

FOLDER holds the rows of a `panda table`. A panel is a class, with raw features above and normalised ones below; a line
is a method, dotted where it does not train.
"""

import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from panda_lightning.tables.rows import Rows

WORD = ", normalised"


def draw(folder: Path) -> None:
    """Draw the picture of a folder of rows."""
    curves = {}
    for one in (one for one in Rows(folder).read() if one.error is None):
        name = one.row.column.removesuffix(f", {one.row.shots}-shot")
        curves[one.row.normal, WORD in name, name.removesuffix(WORD)] = one.curve
    classes = sorted({normal for normal, _, _ in curves})
    spaces = sorted({space for _, space, _ in curves})
    names = sorted({name for _, _, name in curves})
    shades = dict(zip(names, colormaps["viridis"].resampled(len(names)).colors, strict=True))
    figure = Figure(figsize=(4 * len(classes) + 1.5, 3 * len(spaces)), layout="constrained")
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
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(folder / "curves.png", dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
