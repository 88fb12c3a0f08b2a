"""What the plots share: a sheet with a caption, a line with its band, crosses, labelled levels."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.jobs import DESCRIPTIONS
from experiments.results import Curve, Results
from rezero_jax.analysis.theme import COLOURS, plain_ticks

GREY = "#888888"
OF_RULES = {  # in order: the first word that a name contains decides
    "frozen": GREY,
    "rezero": "#D55E00",
    "layerscale": "#000000",
    "pre": "#56B4E9",
    "post": "#E69F00",
    "norm": "#CC79A7",
    "res": "#009E73",
    "": "#0072B2",
}


def sheet(
    title: str,
    caption: str,
    panels: int = 1,
    height: float = 3.8,
    columns: int = 2,
    width: float = 3.3,
    margin: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels of this size (inches), at most `columns` in a row, above a caption."""
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure = Figure(figsize=(2.4 + width * columns, height * rows + margin))
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    figure.suptitle(title, fontsize=10)
    text = textwrap.fill(caption, 40 + int(17 * width * columns))
    figure.supxlabel(text, fontsize=7, color="#444444")
    return figure, axes


def sheet_of(results: Results, panels: int = 1, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """The figure of an experiment, which states its scale and setting."""
    described = DESCRIPTIONS[results.experiment]
    caption = f"Scale {results.scale}. {described.setting[results.scale]}"
    return sheet(described.title, caption, panels, height)


def colour_of(name: str) -> str:
    """The colour that a residual rule has in every figure, by the first of OF_RULES in its name."""
    lowered = name.lower()
    return next((colour for word, colour in OF_RULES.items() if word in lowered), COLOURS[0])


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


def histogram(axis: Axes, curve: Curve, width: float, label: str, colour: str) -> None:
    """Shares of values in bins of a width, whose centres are the curve's x."""
    edges = np.append(curve.x, curve.x[-1] + width) - width / 2
    axis.stairs(curve.y, edges, color=colour, fill=True, alpha=0.25)
    axis.stairs(curve.y, edges, color=colour, label=label)


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


def epoch_losses(axis: Axes, results: Results, lowest: float = np.inf) -> None:
    """The training losses by epoch of every setting on a logarithmic axis that shows `lowest`."""
    for setting, colour in colours(results.curves).items():
        line(axis, results.curves[setting]._replace(half=None), setting, colour)
    axis.set(xlabel="epoch", ylabel="training cross entropy (nats)", yscale="log")
    lowest = min([lowest, *(y for drawn in results.curves.values() for y in drawn.y)])
    axis.set_ylim(lowest / 1.2, 4)  # what exploded comes in from above
    plain_ticks(axis)


def levels(axis: Axes, values: Mapping[str, float]) -> None:
    """Horizontal lines, each with its label and value right of the panel."""
    for label, value in values.items():
        axis.axhline(value, color=GREY, lw=0.8, ls="--", zorder=0)
        axis.annotate(
            f"{label}\n{value:.2f}",
            (1.01, value),
            xycoords=axis.get_yaxis_transform(),
            va="center",
            fontsize=7,
            color="#555555",
        )


def legend(axis: Axes, title: str | None = None) -> None:
    """The legend right of the panel and of its `levels`, where it covers no curve."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [textwrap.fill(label, 22) for label in labels]
    shown = axis.legend(handles, labels, title=title, loc="upper left", fontsize=8)
    shown.set_bbox_to_anchor((1.14 if axis.texts else 1, 1), axis.transAxes)
    # In an empty cell of the figure, the legend needs no room between the panels.
    places = [spec.num1 for one in axis.figure.axes if (spec := one.get_subplotspec())]
    here = axis.get_subplotspec()
    shown.set_in_layout(here is None or here.is_last_col() or here.num1 + 1 in places)


def target(axis: Axes, value: float, label: str | None = None) -> None:
    """A dotted horizontal line."""
    axis.axhline(value, color=GREY, lw=0.8, ls=":", label=label)


def bits_per_byte(
    axis: Axes, results: Results, unit: str, split: str, also: Sequence[float] = ()
) -> None:
    """Labels an axis of bits per byte that shows the text's entropies and the values `also`."""
    levels(axis, results.levels)
    drawn = [np.asarray(line.get_ydata(), float) for line in axis.lines]
    values = np.concatenate([*drawn, list(results.levels.values()), list(also)])
    axis.set(xlabel=unit, ylabel=f"bits per byte, {split}")
    axis.set_ylim(np.nanmin(values) - 0.1, min(np.nanmax(values) + 0.1, 8))
    legend(axis)


def size_axis(axis: Axes, sizes: Sequence[int], label: str) -> None:
    """A logarithmic x axis with a tick at each size and none between."""
    axis.set(xscale="log", xlabel=label)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xticks([], minor=True)


def save(figure: Figure, folder: Path, name: str, *, svg: bool = True) -> None:
    """Writes NAME.png and NAME.svg, the same bytes for the same numbers, with letters as shapes."""
    if svg:
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{name}.png")
