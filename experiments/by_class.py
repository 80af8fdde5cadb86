"""Draw what adaptation gains by class: python experiments/by_class.py FOLDER writes FOLDER/by_class.png.

FOLDER holds the rows of a `panda table` with DN2, and with "DN2, normalised" if methods are normalised. A point is the
AUROC of a method less that of DN2 on the same images, both raw or both normalised; bars are DeLong's 95 % intervals for
pairs. Methods that lack a class or see pixels alone are left out.
"""

import sys
from pathlib import Path

import numpy as np
from gains import WORD, Gains
from matplotlib.figure import Figure

OKABE_ITO = ("#E69F00", "#009E73", "#0072B2", "#D55E00", "#56B4E9", "#CC79A7", "#767676", "#000000")
COLOURS = (*OKABE_ITO, "#882255", "#999933")  # two of Tol's


def draw(folder: Path) -> None:
    """Draw the picture of a folder of rows."""
    gains = Gains(folder)
    classes = gains.classes("DN2")
    columns = sorted({column for column, _ in gains.kept} - {"DN2", f"DN2{WORD}"})
    whole = [column for column in columns if gains.classes(column) == classes]
    names = sorted({column.removesuffix(WORD) for column in whole})
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, end in zip(figure.subplots(2, 1, sharex=True), ("", WORD), strict=True):
        columns = [column for column in whole if column.endswith(WORD) == bool(end)]
        for column in columns:
            name = column.removesuffix(WORD)
            places = (*([normal] for normal in classes), classes)
            gaps = [gains.over(f"DN2{end}", column, some) for some in places]
            beside = min(0.14, 0.8 / len(names)) * (names.index(name) - (len(names) - 1) / 2)
            x = np.array([*range(len(classes)), len(classes) + 0.3]) + beside
            value, low, high = (100 * np.array([getattr(gap, key) for gap in gaps]) for key in ("value", "low", "high"))
            ends = (value - low, high - value)
            axes.errorbar(x, value, ends, fmt="o", ms=4, lw=1.2, color=COLOURS[names.index(name)], label=name)
        axes.axhline(0, color="black", lw=0.8)
        axes.axvline(len(classes) - 0.35, color="grey", lw=0.8, ls=":")
        axes.set_xticks([*range(len(classes)), len(classes) + 0.3], [*classes, f"mean of {len(classes)}"])
        axes.tick_params(labelbottom=True)
        axes.set_title(f"{'normalised' if end else 'raw'} features", loc="left")
        axes.set_ylabel("AUROC less DN2's, points")
        axes.grid(axis="y", alpha=0.25)
    signs = {text: sign for axes in figure.axes for sign, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    handles = [signs[name] for name in names]
    figure.legend(handles, names, ncols=min(len(names), 5), frameon=False, loc="outside upper center")
    figure.savefig(folder / "by_class.png", dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
