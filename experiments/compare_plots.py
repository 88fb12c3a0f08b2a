"""The plots of a comparison: differences to the control, losses by learning rate, curves."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments import drawing
from experiments.comparison import BROKEN, Cell, Comparison
from experiments.statistics import NOT_SIGNIFICANT
from rezero_jax.formatting import number

VERDICTS = {"lower": "#0072B2", "higher": "#D55E00", NOT_SIGNIFICANT: "#777777"}  # their colours
CONTROL = "#BBBBBB"
BEYOND = 1.6  # times the control's loss after a tenth of the run, above which none are drawn


def plot_differences(comparison: Comparison) -> Figure:
    """A panel for each depth: each rule's final test loss minus the control's, with intervals."""
    rules = [rule for rule in comparison.rules if rule != comparison.control]
    figure, axes = drawing.sheet(
        f"Final test loss minus that of {comparison.control}",
        comparison.results.made.command if comparison.results.made else "",
        len(comparison.depths),
        height=1.5 + 0.19 * len(rules),
        columns=3,
        width=2.6 if len(comparison.depths) > 1 else 4.6,
    )
    for axis, depth in zip(axes, comparison.depths, strict=True):
        _draw_differences(axis, comparison, {c.rule: c for c in comparison.at(depth)}, rules)
        axis.set(title=f"{depth} layers", xlabel="nats")
        axis.set_yticks(range(len(rules)), rules if axis is axes[0] else [""] * len(rules))
        axis.set_ylim(max(len(rules), 1) - 0.5, -0.5)
    figure.suptitle(figure.get_suptitle(), x=0.01, ha="left", fontsize=10)  # beside the legend
    handles = [Line2D([], [], color=c, marker="o", label=v) for v, c in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8)
    return figure


def _draw_differences(
    axis: Axes, comparison: Comparison, cells: dict[str, Cell], rules: list[str]
) -> None:
    """Intervals of the rules near the control; words for those far worse, or diverged."""
    axis.axvline(0, color="black", lw=0.8)
    if comparison.noise:
        axis.axvspan(-comparison.noise, comparison.noise, color=CONTROL, alpha=0.4, lw=0)
    control = cells[comparison.control].final
    loss = control.mean if control else None
    found = {rule: comparison.difference(cells[rule]) for rule in rules}
    drawn = {
        rule: (difference.sample.mean or 0.0, difference.sample.interval() or (0.0, 0.0))
        for rule, difference in found.items()
        if difference
    }
    near = [(mean, ends) for mean, ends in drawn.values() if loss and mean < loss]
    low, high = (of([0.0, *(mean for mean, _ in near)]) for of in (min, max))
    span = (high - low) or 1.0
    half = max([ends[1] - mean for mean, ends in near], default=0.0)
    margin = min(max(0.25 * span, 1.1 * half), 0.5 * span)  # intervals of few seeds are wide
    axis.set_xlim(low - margin, high + margin)
    for y, (rule, difference) in enumerate(found.items()):
        if difference is None:
            final = cells[rule].final
            text = "not comparable" if final and None not in final.draws else "diverged"
        elif drawn[rule][0] > high:
            text = f"+{number(drawn[rule][0], 2)}, {difference.verdict}"
        else:
            colour = VERDICTS[difference.verdict]
            axis.plot(drawn[rule][1], (y, y), color=colour, lw=1.4)
            axis.plot(drawn[rule][0], y, "o", color=colour, ms=4)
            continue
        axis.annotate(text, (0.98, y), xycoords=axis.get_yaxis_transform(), va="center", ha="right")


def _word(axis: Axes, best: float, colour: str) -> None:
    """Says why a panel has no line; `best` is the lowest loss, infinite if all runs diverged."""
    text = "diverged" if math.isinf(best) else f"above: at best {number(best, 3)}"
    axis.text(0.5, 0.6, text, color=colour, ha="center", transform=axis.transAxes)


def plot_rates(comparison: Comparison) -> Figure:
    """A panel for each rule: final test loss by learning rate.

    A cross: training diverged, or the loss lies above what every rule reaches at its best rate.
    """
    best = [loss for c in comparison.cells if math.isfinite(loss := min(c.tuning.values()))]
    top = 1.1 * max((x for x in best if x <= BROKEN * np.median(best)), default=math.inf)

    def draw(axis: Axes, cell: Cell, colour: str) -> None:
        shown = {rate: loss for rate, loss in cell.tuning.items() if loss <= top}
        axis.plot(list(shown), list(shown.values()), "o-", color=colour, ms=3)
        broken = [rate for rate in cell.tuning if rate not in shown]
        if not shown and len(comparison.depths) == 1:
            _word(axis, min(cell.tuning.values()), colour)
        axis.plot(broken, [1.02 * top] * len(broken), "x", color=colour)

    figure, axes = _panels(comparison, "Where each rule trains, and where it breaks", draw)
    rates = sorted({rate for cell in comparison.cells for rate in cell.tuning})
    shown = rates[:: -(-len(rates) // 3)]
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(shown, [f"{rate:.3g}" for rate in shown])
        axis.minorticks_off()
    figure.supylabel("final test loss (nats), by learning rate", fontsize=8)
    return figure


def plot_curves(comparison: Comparison) -> Figure:
    """A panel for each rule: the training loss by update at its best learning rate."""
    smooth = {(c.rule, c.depth): _smoothed(c) for c in comparison.cells if c.curves}

    def draw(axis: Axes, cell: Cell, colour: str) -> None:
        if not cell.curves:
            return
        updates, losses = smooth[cell.rule, cell.depth]
        mean = losses.mean(0)
        axis.plot(updates, mean, color=colour, lw=1.2)
        if len(losses) > 1 and colour != CONTROL:
            spread = losses.std(0, ddof=1)
            axis.fill_between(updates, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)

    rate = (
        "Each rule at its own best learning rate" if comparison.is_tuned else "At one learning rate"
    )
    figure, axes = _panels(comparison, rate, draw)
    lows = [0.95 * losses.mean(0).min() for _, losses in smooth.values()]
    tops = [
        BEYOND * losses.mean(0)[len(losses[0]) // 10]
        for (rule, _), (_, losses) in smooth.items()
        if rule == comparison.control
    ]
    axes[0].set_ylim(min(lows, default=None), max(tops, default=None))
    low, high = axes[0].get_ylim()
    for axis, rule in zip(axes, comparison.rules, strict=True):
        ends = [losses.mean(0).min() for (name, _), (_, losses) in smooth.items() if name == rule]
        if min(ends, default=math.inf) > high:
            _word(axis, min(ends, default=math.inf), "#444444")
    for axis in axes:
        drawing.levels(axis, {n: y for n, y in comparison.results.levels.items() if low < y < high})
    figure.supylabel("training loss (nats), by update", fontsize=8)
    return figure


def _smoothed(cell: Cell) -> tuple[list[float], np.ndarray]:
    """The updates (lines,) and the smoothed training losses (seeds, lines) of a cell."""
    curves = [drawing.smoothed(curve) for curve in cell.curves]
    length = min(len(curve.x) for curve in curves)
    return curves[0].x[:length], np.array([curve.y[:length] for curve in curves])


def _panels(
    comparison: Comparison, title: str, draw: Callable[[Axes, Cell, str], None]
) -> tuple[Figure, list[Axes]]:
    """A panel for each rule, in which each depth has its colour, above the control in grey."""
    made = comparison.results.made
    caption = f"Grey: {comparison.control}. {made.command if made else ''}"
    figure, axes = drawing.sheet(
        title, caption, len(comparison.rules), height=1.6, columns=4, width=1.9, margin=0.9
    )
    colours = drawing.colours(map(str, comparison.depths))
    for axis, rule in zip(axes, comparison.rules, strict=True):
        axis.sharex(axes[0])
        axis.sharey(axes[0])
        of_rule = comparison.of(rule)
        for cell in of_rule:
            if rule != comparison.control:
                draw(axis, comparison.control_of(cell), CONTROL)
        for cell in of_rule:
            draw(axis, cell, colours[str(cell.depth)])
        axis.set_title(rule)
    handles = [Line2D([], [], color=c, label=f"{depth} layers") for depth, c in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)
    return figure, axes
