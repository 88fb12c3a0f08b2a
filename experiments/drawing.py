"""What the plots share: a sheet that states the setting, a line with its band, crosses."""

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import Curve
from rezero_jax.analysis.plots.theme import COLOURS


def sheet(
    title: str, scale: str, setting: str, panels: int = 1, height: float = 3.8
) -> tuple[Figure, list[Axes]]:
    """A figure with panels, two in a row, and the scale and setting written below them."""
    return captioned(title, f"Scale {scale}. {setting}", panels, height)


def captioned(
    title: str,
    caption: str,
    panels: int = 1,
    height: float = 3.8,
    columns: int = 2,
    width: float = 3.3,
    margin: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels, so many in a row, of that height and width, and a caption below.

    Title and caption take their room from the panels, but for a `margin` in height.
    """
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure = Figure(figsize=(2.4 + width * columns, height * rows + margin))
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    figure.suptitle(title, fontsize=10)
    text = textwrap.fill(caption, 40 + int(17 * width * columns))
    figure.supxlabel(text, fontsize=7, color="#444444")
    return figure, axes


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def line(axis: Axes, curve: Curve, label: str | None, colour: str, width: float = 1.5) -> None:
    """The mean over the runs, and the band of its 95 % interval where there are several."""
    y = np.array(curve.y, float)
    marker = "o" if len(y) == 1 else None  # one point alone draws no line
    axis.plot(curve.x, y, color=colour, label=label, lw=width, marker=marker)
    if curve.half is not None:
        half = np.array(curve.half, float)
        axis.fill_between(curve.x, y - half, y + half, color=colour, alpha=0.2, lw=0)


def smoothed(curve: Curve) -> Curve:
    """Moving means over a twentieth of the curve, up to its end; an empty curve stays empty."""
    if not curve.x:
        return curve
    window = max(len(curve.x) // 20, 1)
    means = np.convolve(np.array(curve.y, float), np.ones(window) / window, "valid")
    return Curve(curve.x[window - 1 :], means.tolist())


def crosses(
    axis: Axes, points: Iterable[tuple[float, float]], colour: str, until: float = np.inf
) -> bool:
    """Draws the paper's numbers with x <= until; returns whether there are any."""
    shown = [point for point in points if point[0] <= until]
    if shown:
        axis.plot(*zip(*shown, strict=True), "x", color=colour, markersize=5)
    return bool(shown)


def levels(axis: Axes, values: Mapping[str, float]) -> None:
    """Horizontal lines, each with its label and value right of the panel."""
    for label, value in values.items():
        axis.axhline(value, color="#888888", lw=0.8, ls="--", zorder=0)
        axis.annotate(
            f"{label}\n{value:.2f}",
            (1.01, value),
            xycoords=axis.get_yaxis_transform(),
            va="center",
            fontsize=7,
            color="#555555",
        )


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg, the same bytes for the same numbers, with letters as shapes."""
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{name}.png")
