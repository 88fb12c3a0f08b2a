"""The theme of all figures: legible in a printed column, and in black and white."""

import io
import math
import textwrap
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike

from rezero_jax.errors import UserError, check_choice, printable
from rezero_jax.runs.files import AnyPath, path_of, replace_file

# Okabe and Ito's colours are distinct to colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FORMATS = (".png", ".svg", ".pdf")
RC_PARAMS: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.handlelength": 2.8,  # fits a pattern of dashes
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "axes.prop_cycle": cycler(color=COLOURS),
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "svg.fonttype": "none",  # text remains text
}

# A decorator that applies the theme to the figure of one function only.
themed = matplotlib.rc_context(RC_PARAMS)  # type: ignore[arg-type]


def line_styles(count: int) -> list[dict[str, Any]]:
    """Colour, line and marker of each of `count` curves, for Axes.plot; the first 49 differ."""
    kinds = len(COLOURS)
    shifted = [(i % kinds, (i + i // kinds) % kinds) for i in range(count)]
    return [{"color": COLOURS[i], "linestyle": LINES[k], "marker": MARKERS[k]} for i, k in shifted]


def plot_line(axis: Axes, x: np.ndarray, y: ArrayLike, **style: Any) -> None:
    """Calls Axes.plot with about ten markers, whatever the number of points."""
    axis.plot(x, y, markevery=max(len(x) // 10, 1), **style)


def legend(figure: Figure, axis: Axes) -> None:
    """Puts an axis's legend below all axes, so that it covers no curve; enlarges the figure."""
    handles, labels = axis.get_legend_handles_labels()
    width = int(12 * figure.get_figwidth())  # characters that fit on a line
    columns = max(min(width // (max(map(len, labels), default=0) + 8), len(labels), 3), 1)
    labels = [textwrap.fill(label, width) for label in labels]
    lines = sum(1.5 + label.count("\n") for label in labels[::columns])
    figure.set_figheight(figure.get_figheight() + 0.16 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain_ticks(axis: Axes) -> None:
    """Labels ticks of a log axis as 0.2, not 2e-01, and omits labels that would overlap."""
    low, high = axis.get_ylim()
    low = low if low > 0 else min(y for y in [*axis.get_yticks(), high] if y > 0)  # it shows 0
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = ("1", "13", "12346", "123456789")  # first digits

    def shown(digits: str) -> int:
        return sum(bool(low <= int(d) * 10.0**k <= high) for k in decades for d in digits)

    labelled = next((digits for digits in choices if shown(digits) > 2), choices[-1])

    def text(value: float, position: float | int | None) -> str:
        return f"{value:g}" if f"{value:e}"[0] in "0" + labelled else ""

    axis.yaxis.set_major_formatter(text)
    axis.yaxis.set_minor_formatter(text)


def check_ending(path: AnyPath) -> None:
    """Raises a UserError if the path does not end in one of FORMATS."""
    suffix = path_of(path).suffix
    check_choice("ending of a picture", suffix, FORMATS)


@themed
def save(figure: Figure, path: AnyPath) -> epath.Path:
    """Writes the figure in the format of the path's ending, one of FORMATS, and returns the path.

    Raises a UserError if the path has another ending, or the file cannot be written.
    """
    check_ending(path)
    for text in figure.findobj(Text):  # from any run: no formulas, control characters or books
        lines = map(printable, text.get_text()[:1000].split("\n"))
        text.set_text("\n".join(lines).replace("$", r"\$"))
    file, content = path_of(path), io.BytesIO()
    figure.savefig(content, format=file.suffix[1:])
    try:
        replace_file(file, content.getvalue())
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {path} ({why}); name another file with --out") from error
    return file
