"""Figures of spectra, signals by depth, gates, and times to a target."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rezero_jax.analysis.diagnosis import Diagnosis
from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.propagation import Propagation
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.analysis.theme import COLOURS, legend, line_styles, plain_ticks, plot_line, themed

FLOOR = 1e-16  # smaller singular values are rounding errors, and are drawn at this value
SHARE = "|x' - x| / |x| of each layer (dotted: idle below)"
PANELS = ("|x|", "|dL/dx|", "cosine of two examples' x", SHARE)


@themed
def plot_spectra(spectra: Mapping[str, Float[np.ndarray, "..."]]) -> Figure:
    """Histograms of log10 of singular values by label, as in the paper's Figure 4."""
    figure = Figure(figsize=(5.5, 3.2))
    axis = figure.subplots()
    logs = {
        label: np.log10(np.maximum(np.asarray(values, float).ravel(), FLOOR))
        for label, values in spectra.items()
    }
    around_1 = [-0.25, 0.25]  # so that rounding errors do not fill the axis
    edges = np.histogram_bin_edges(np.concatenate([*logs.values(), around_1]), 60)
    for style, (label, values) in zip(line_styles(len(logs)), logs.items(), strict=True):
        fractions = np.histogram(values, edges)[0] / len(values)
        mean = np.mean(10.0 ** (2 * values))
        del style["marker"]
        axis.stairs(fractions, edges, **style, label=f"{label}, mean square {mean:.3g}")
        axis.stairs(fractions, edges, fill=True, color=style["color"], alpha=0.15)
    axis.axvline(0, color=COLOURS[-1], linewidth=0.8, linestyle=":")
    axis.set(xlabel="log10 of the singular values", ylabel="fraction of the values", ylim=(0, None))
    legend(figure, axis)
    return figure


@themed
def plot_propagation(networks: Mapping[str, Propagation]) -> Figure:
    """Signals, gradients, angles and relative changes by depth, one line per network."""
    figure = Figure(figsize=(7, 5))
    axes = list(figure.subplots(2, 2).flat)
    _draw_propagation(axes, networks)
    if len(networks) > 1:
        legend(figure, axes[0])
    return figure


def _draw_propagation(axes: Sequence[Axes], networks: Mapping[str, Propagation]) -> None:
    for style, (label, network) in zip(line_styles(len(networks)), networks.items(), strict=True):
        drawn = (network.signal, network.gradient, network.cosine, network.share)
        for axis, values in zip(axes, drawn, strict=True):
            plot_line(axis, np.arange(len(values)), values, **style, label=label)
        axes[3].axhline(network.idle_below, color=style["color"], linewidth=0.8, linestyle=":")
    for axis, title in zip(axes, PANELS, strict=True):
        axis.set(title=title, xlabel="layer, from 0" if axis is axes[3] else "layers passed")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        y = np.concatenate([x.get_ydata() for x in axis.lines if x.get_marker() != "None"])
        if axis is not axes[2] and (y > 0).any():
            zero = {"linthresh": y[y > 0].min(), "linscale": 0.5} if (y == 0).any() else {}
            axis.set_yscale("symlog" if zero else "log", **zero)
            low, high = axis.get_ylim()
            widen = max(2 * low / high, 1) ** 0.5  # hides the rounding errors of a constant
            axis.set_ylim(low / widen, high * widen)
            plain_ticks(axis)


@themed
def plot_diagnosis(diagnosis: Diagnosis, gates: Gates | None = None) -> Figure:
    """Signals by depth, alpha by layer, and, with a run's gates, alpha by layer and step."""
    gated = bool(diagnosis.is_gated.any())
    columns = 2 + gated
    figure = Figure(figsize=(3.5 * columns, 5))
    axes = figure.subplots(2, columns)
    _draw_propagation(list(axes[:, :2].flat), {"": diagnosis.propagation})
    if gated:
        alpha = diagnosis.propagation.alpha
        layers = np.arange(len(alpha))
        few = len(alpha) <= 200  # more lines would merge into an area
        if few:
            axes[0, 2].vlines(layers, 0, alpha, color=COLOURS[0], linewidth=1)
        axes[0, 2].plot(layers, alpha, "o", color=COLOURS[0], markersize=3.5 if few else 0.5)
        axes[0, 2].set(xlabel="layer, from 0", title="alpha")
        axes[0, 2].xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if gates is None:
            axes[1, 2].remove()
        else:
            draw_gates(axes[1, 2], gates.steps, gates.alphas)
    title = f"{diagnosis.subject}; mean squared singular value {diagnosis.jacobian.mean:.3g}"
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())))
    return figure


@themed
def plot_gates(gates: Gates) -> Figure:
    """Every alpha by step and layer (Figure 8), mean |alpha|, and the step of each maximum."""
    figure = Figure(figsize=(10, 3))
    every, mean, peaks = figure.subplots(1, 3)
    draw_gates(every, gates.steps, gates.alphas)
    layers = gates.alphas.shape[1]
    mean.plot(gates.steps, gates.mean_abs, color=COLOURS[0])
    mean.axhline(1 / layers, color=COLOURS[1], linestyle="--")
    mean.set(xlabel="step", title="mean |alpha| (dashed: 1 / layers)", ylim=(0, None))
    peaks.plot(gates.peak_steps, np.arange(layers), linestyle="", marker="o", color=COLOURS[0])
    peaks.set(xlabel="step", ylabel="layer, from 0", title="step of the largest |alpha|")
    peaks.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def draw_gates(axis: Axes, x: np.ndarray, alphas: np.ndarray, xlabel: str = "step") -> None:
    """Draws alphas (lines, layers) by layer and x (lines,), such as the step."""
    bound = np.abs(alphas).max() or 1.0
    draw_by_layer(axis, x, alphas.T, xlabel, "alpha", cmap="PuOr", vmin=-bound, vmax=bound)


def draw_by_layer(
    axis: Axes,
    x: np.ndarray,
    values: np.ndarray,
    xlabel: str,
    title: str,
    layers: str = "layer, from 0",
    **colours: Any,
) -> None:
    """Draws values (layers, points) by layer and x (points,), such as the step; NaN stays blank.

    `layers` is the label of the layers' axis, and `colours` are arguments of `Axes.pcolormesh`.
    """
    by_layer: Axis = axis.yaxis if len(x) > 1 else axis.xaxis
    if len(x) > 1:
        # Rasterized, because an SVG would otherwise have a shape for each layer and line.
        mesh = axis.pcolormesh(x, np.arange(len(values)), values, rasterized=True, **colours)
        axis.figure.colorbar(mesh, ax=axis)
        axis.set(xlabel=xlabel, ylabel=layers, title=title)
        axis.grid(False)
    else:
        axis.plot(np.arange(len(values)), values[:, 0], "o", color=COLOURS[0])
        axis.set(xlabel=layers, title=f"{title}, {xlabel} {x[0]:g}")
    by_layer.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


@themed
def plot_times(times: Mapping[str, Sequence[float | None]], xlabel: str) -> Figure:
    """Times to a target by setting: every seed, the mean and its 95 % interval.

    A time is None if the seed did not reach the target. The setting then has no mean, and its label
    has the number of seeds that did.
    """
    names = [textwrap.fill(label, 32) for label in times]
    lines = sum(1.5 + name.count("\n") for name in names)
    figure = Figure(figsize=(5.5, 0.9 + 0.2 * lines))
    axis = figure.subplots()
    for row, (style, seeds) in enumerate(zip(line_styles(len(times)), times.values(), strict=True)):
        known = [time for time in seeds if time is not None]
        points = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
        axis.plot(known, [row] * len(known), **points, markerfacecolor="none")
        if estimate := Estimate.of_all(seeds):
            half = estimate.interval()[1] - estimate.mean  # NaN, and not drawn, for a single seed
            axis.errorbar([estimate.mean], [row], xerr=half, **points, markersize=6, capsize=4)
        else:
            names[row] += f"\n{len(known)} of {len(seeds)} reached it"
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    axis.set_xlim(left=min(0, axis.get_xlim()[0]))
    if not any(time is not None for seeds in times.values() for time in seeds):
        axis.set_xticks([])
    axis.grid(axis="y", visible=False)
    return figure
