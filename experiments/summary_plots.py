"""The three figures of docs/results.md, with direct labels and a fixed colour for each rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import drawing
from experiments.comparison import NO_LAYERS, Comparison
from experiments.jobs import CONTROL
from experiments.published import curve
from experiments.spectra import BIN
from experiments.summary import Found

WIDE, DPI = (8.4, 4.2), 160  # inches; 1,344 x 672 pixels
RULES = ("rezero", "layerscale", "pre_norm", "post_norm", "residual")  # of the figure over depth
TITLES = {"fc": "Fully connected, CIFAR-10, one epoch", "transformer": "Transformer, 200 updates"}
BAR: Mapping[str, Any] = {"lw": 3, "alpha": 0.4}  # of an interval
WORST = 1.75  # times the best loss: what is above leaves the panel
BOX = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5}  # behind a label
LABELS = {"FC + ReZero": "ReZero", CONTROL: "gates frozen at 0"}


def figure_5(found: Found) -> Figure:
    """Training loss by epoch of the four architectures and the control, beside the paper's."""
    figure = Figure(figsize=WIDE, dpi=DPI)
    axis, results = figure.add_subplot(), found.results["fc"]
    for setting, drawn in results.curves.items():
        colour, y = drawing.colour_of(setting), np.array(drawn.y, float)
        axis.plot(drawn.x, y, color=colour, lw=1.8)
        for row in results.rows:
            if row.setting == setting and row.metric.startswith("epochs to") and row.mean:
                target = float(row.metric.removeprefix("epochs to "))
                axis.plot(row.interval() or (row.mean,) * 2, [target] * 2, color=colour, **BAR)
        points = curve("fc", setting, "loss of epoch")
        points += [(x, y) for y, x in curve("fc", setting, "epochs to")]
        drawing.crosses(axis, points, colour)
        at: dict[str, Any] = {"xytext": (4, 0), "ha": "left", "va": "center"}
        if setting == CONTROL:  # below its end, where no other line is
            at = {"xytext": (12, -6), "ha": "right", "va": "top"}
        at |= {"textcoords": "offset points", "weight": "bold", "bbox": BOX}
        axis.annotate(LABELS.get(setting, setting), (drawn.x[-1], y[-1]), color=colour, **at)
    axis.set(yscale="log", ylim=(0.05, 3), xlim=(0, 265))
    axis.set(xlabel="epoch", ylabel="training loss (nats)")
    drawing.plain_ticks(axis)
    return figure


def over_depth(found: Found) -> Figure:
    """Final test loss against depth in both families; the control is a grey line."""
    figure = Figure(figsize=WIDE, dpi=DPI)
    for place, (name, title) in enumerate(TITLES.items(), 1):
        axis, comparison = figure.add_subplot(1, 2, place), found.compared[name]
        _depth_panel(axis, comparison, _control(found, name))
        axis.set(title=title, xlabel="layers")
        if place == 1:
            axis.set_ylabel("final test loss (nats)")
    return figure


def _control(found: Found, name: str) -> float:
    """The mean final loss with all gates frozen at 0, which is the same at every depth."""
    frozen = found.compared.get(f"{name}_frozen", found.compared[name])
    final = frozen.of(NO_LAYERS)[0].final
    return (final.mean if final else None) or np.nan


def _depth_panel(axis: Axes, comparison: Comparison, control: float) -> None:
    depths = comparison.depths
    finals = {rule: [cell.final for cell in comparison.of(rule)] for rule in RULES}
    best = min(final.mean for rows in finals.values() for final in rows if final and final.mean)
    top = WORST * best if control < WORST * best else 1.1 * control
    ends = list[tuple[float, str]]()
    for rule, rows in finals.items():
        known = [(x, row) for x, row in enumerate(rows) if row and row.mean and row.mean < top]
        x, means = [x for x, _ in known], [row.mean or 0.0 for _, row in known]
        axis.plot(x, means, "o-", color=drawing.colour_of(rule), lw=1.8)
        for place, row in known:
            axis.plot([place] * 2, row.interval() or (), color=drawing.colour_of(rule), **BAR)
        if known and x[-1] == len(depths) - 1:
            ends.append((means[-1], rule))
        elif known:
            axis.annotate(
                f"{rule}: blows up",
                (x[-1], means[-1]),
                xytext=(6, -12),
                textcoords="offset points",
                color=drawing.colour_of(rule),
            )
    axis.axhline(control, color=drawing.GREY, ls="--", lw=1.2)
    ends.append((control, "gates frozen at 0"))
    _labels(axis, ends, top - best)
    axis.set_xticks(range(len(depths)), [f"{depth}" for depth in depths])
    axis.set_xlim(-0.2, len(depths) - 0.1)


def _labels(axis: Axes, ends: Sequence[tuple[float, str]], span: float) -> None:
    """Names at the right ends of lines, moved apart where they would overlap."""
    height = -np.inf
    for value, name in sorted(ends):
        height = max(value, height + 0.055 * span)
        place: dict[str, Any] = {"xycoords": axis.get_yaxis_transform(), "va": "center"}
        axis.annotate(name, (1.01, height), color=drawing.colour_of(name), **place)


def singular_values(found: Found) -> Figure:
    """Histograms of log10 of the singular values of 64-layer Transformers."""
    figure = Figure(figsize=WIDE, dpi=DPI)
    axis, curves = figure.add_subplot(), found.results["jacobian"].curves
    shown = {
        "post-norm, 64 layers": "post-norm, fresh",
        "ReZero, 64 layers, after 200 updates": "ReZero after 200 updates",
        "ReZero, 64 layers, epoch 0": "ReZero, fresh: all values are 1",
    }
    for place, (name, label) in enumerate(shown.items()):
        x, shares = np.array(curves[name].x), np.array(curves[name].y, float)
        colour = drawing.GREY if place == 2 else drawing.colour_of(name)
        axis.stairs(shares, np.append(x, x[-1] + BIN) - BIN / 2, color=colour, fill=True, alpha=0.5)
        peak = shares.argmax()
        at: dict[str, Any] = {"xytext": (-8, -4) if place else (0, 5), "weight": "bold"}
        at |= {"ha": "right" if place else "center"}
        axis.annotate(
            label, (x[peak], shares[peak]), textcoords="offset points", color=colour, **at
        )
    axis.set(xlabel="log10 of the singular values", ylabel="share of the values")
    return figure


PLOTS: Mapping[str, Callable[[Found], Figure]] = {
    "figure5": figure_5,
    "depth": over_depth,
    "singular_values": singular_values,
}
