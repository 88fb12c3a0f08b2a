"""Figures of what this package measures: spectra, gates, times to a target."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.runs import Times
from rezero_jax.analysis.style import COLOURS, legend, looks, styled, wrap

Values = Float[np.ndarray, "..."]


@styled
def plot_spectra(spectra: Mapping[str, Values], *, floor: float = 1e-16, bins: int = 60) -> Figure:
    """Histograms of log10 of singular values, as in the paper's Figure 4.

    Args:
      spectra: label -> singular values of any shape.
      floor: values below count as this one; machine precision makes them up.
      bins: how many, from the smallest to the largest of all values.
    """
    figure = Figure(figsize=(5.5, 3.2))
    axis = figure.subplots()
    logs = {
        label: np.log10(np.maximum(np.asarray(values, float).ravel(), floor))
        for label, values in spectra.items()
    }
    low = min(values.min() for values in logs.values())
    high = max(values.max() for values in logs.values())
    margin = max(0.05 * (high - low), 0.25)
    edges = np.linspace(low - margin, high + margin, bins + 1)
    for look, (label, values) in zip(looks(len(logs)), logs.items(), strict=True):
        fractions = np.histogram(values, edges)[0] / len(values)
        mean = np.mean(10.0 ** (2 * values))
        axis.stairs(
            fractions,
            edges,
            color=look["color"],
            linestyle=look["linestyle"],
            label=f"{label}, mean square {mean:.3g}",
        )
        axis.stairs(fractions, edges, fill=True, color=look["color"], alpha=0.15)
    axis.axvline(0, color=COLOURS[-1], linewidth=0.8, linestyle=":")
    axis.set(xlabel="log10 of the singular values", ylabel="fraction of them", ylim=(0, None))
    legend(figure, axis)
    return figure


@styled
def plot_gates(gates: Gates) -> Figure:
    """Every alpha by step and layer (Figure 8), their mean size, and when each is largest."""
    figure = Figure(figsize=(10, 3))
    every, mean, peaks = figure.subplots(1, 3)
    draw_gates(every, gates.steps, gates.alphas)
    layers = gates.alphas.shape[1]
    mean.plot(gates.steps, gates.mean_abs, color=COLOURS[0])
    mean.axhline(1 / layers, color=COLOURS[1], linestyle="--", label="1 / layers")
    mean.set(xlabel="step", title="mean |alpha|", ylim=(0, None))
    mean.legend()
    peaks.plot(gates.peak_steps, np.arange(layers), linestyle="", marker="o", color=COLOURS[0])
    peaks.set(xlabel="step", ylabel="layer", title="step of the largest |alpha|")
    peaks.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_gates(axis: Axes, steps: np.ndarray, alphas: np.ndarray) -> None:
    """Every alpha (lines, layers) by step and layer, with its sign."""
    bound = max(np.abs(alphas).max(), 1e-12)
    mesh = axis.pcolormesh(
        steps,
        np.arange(alphas.shape[1]),
        alphas.T,
        cmap="PuOr",
        vmin=-bound,
        vmax=bound,
        rasterized=True,  # thousands of layers and lines would be as many shapes in an SVG
    )
    axis.figure.colorbar(mesh, ax=axis)
    axis.set(xlabel="step", ylabel="layer", title="alpha")
    axis.grid(False)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


@styled
def plot_times(times: Mapping[str, Times], xlabel: str, confidence: float = 0.95) -> Figure:
    """When each setting reached a target: its seeds, their mean and its interval.

    A setting whose seeds did not all get there has its seeds alone, and says how many did.

    Args:
      times: of `rezero_jax.analysis.runs.times_to`.
      xlabel: what is counted, such as "epochs to a loss of 0.8".
      confidence: of the intervals; see `Estimate.interval`.
    """
    names = [wrap(label) for label in times]
    lines = sum(1.5 + name.count("\n") for name in names)
    figure = Figure(figsize=(5.5, 0.9 + 0.2 * lines))
    axis = figure.subplots()
    for row, (look, group) in enumerate(zip(looks(len(times)), times.values(), strict=True)):
        known = [time for time in group.seeds if time is not None]
        points = {"color": look["color"], "marker": look["marker"], "linestyle": ""}
        axis.plot(known, [row] * len(known), **points, markerfacecolor="none")
        if group.estimate is None:
            names[row] += f"\n{len(known)} of {len(group.seeds)} got there"
            continue
        mean = group.estimate.mean
        axis.plot([mean], [row], **points, markersize=6)
        if group.estimate.count > 1:
            low, high = group.estimate.interval(confidence)
            axis.errorbar(
                [mean], [row], xerr=[[mean - low], [high - mean]], color=look["color"], capsize=4
            )
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    axis.set_xlim(left=min(0, axis.get_xlim()[0]))
    axis.grid(axis="y", visible=False)
    return figure
