"""Networks at initialisation and the toy net's learning rates: protocol.md's E4, without runs."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import drawing, initial_jacobians
from experiments.claims import INFORMATIVE, Claim, all_or_none
from experiments.initial_jacobians import TOKENS, WIDTH, means_of_ten
from experiments.jobs import Job
from experiments.published import published
from experiments.results import Curve, Results, Row
from experiments.stable_rate import largest_stable_rate
from experiments.statistics import LEVEL
from rezero_jax.analysis.theme import COLOURS
from rezero_jax.formatting import number
from rezero_jax.runs.reader import Run

COUNT = {"paper": 1000, "cpu": 1000, "smoke": 20}

NETS = [(rule, depth) for depth in (12, 128) for rule in ("post-norm", "pre-norm", "ReZero")]
SQUARES = "mean squared singular value"
ROUNDS_TO_ZERO = 0.0005  # below it a number prints as 0.000
LAYERS = range(10, 41, 5)  # of the toy net
LAYER_NORM, UNIFORM, XAVIER = "LayerNorm", "uniform attention", "attention at initialisation"


def runs(scale: str) -> list[Job]:
    """No runs: `measure` computes everything."""
    return []


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """Parts A, B and C of E4."""
    count, make = COUNT[scale], partial(Row, reduced=scale == "smoke")
    rows: list[Row] = []
    claims: list[Claim] = []
    curves: dict[str, Curve] = {}
    for rule, depth in NETS:
        setting = f"{rule}, {depth} layers"
        values = initial_jacobians.mean_squares(rule, depth, count)
        rows += [
            make(setting, SQUARES, tuple(values.tolist()), depth == 12),
            make(setting, f"median of the {SQUARES}", (float(np.median(values)),)),
        ]
        means = means_of_ten(values)
        claims.append(_notebook(setting, means, count))
        low, high = claims[-1].interval or (np.nan, np.nan)
        curves[setting] = Curve([0, 1, 2], [low, float(values.mean()), high])
    spectra = {
        LAYER_NORM: initial_jacobians.layer_norm(count),
        UNIFORM: initial_jacobians.attention(count, uniform=True),
        XAVIER: initial_jacobians.attention(count, uniform=False),
    }
    for name, values in spectra.items():
        indices = np.arange(1.0, values.shape[1] + 1).tolist()
        for mark, quantile in (("", 0.5), (", low", 0.025), (", high", 0.975)):
            curves[name + mark] = Curve(indices, np.quantile(values, quantile, axis=0).tolist())
    top = (spectra[XAVIER][:, :WIDTH] ** 2).sum(1) / (spectra[XAVIER] ** 2).sum(1)
    metric = f"share of the {WIDTH} largest in the sum of squares"
    rows.append(make(XAVIER, metric, tuple(top.tolist())))
    claims += _appendix(spectra)
    if scale == "smoke":
        claims = [claim._replace(reduced=True) for claim in claims]
    for name, gated in (("residual", False), ("ReZero", True)):
        rates = [largest_stable_rate(layers, gated=gated) for layers in LAYERS]
        curves[name] = Curve(list(LAYERS), rates)
        rows += [
            Row(f"toy net, {name}", f"largest stable rate at {layers} layers", (rate,))
            for layers, rate in zip(LAYERS, rates, strict=True)
        ]
    claims += _equation_7(np.array(curves["residual"].y), np.array(curves["ReZero"].y))
    return Results("initialisation", scale, rows, claims, curves)


def _notebook(setting: str, means: np.ndarray, count: int) -> Claim:
    """Whether a number of the notebook is one of the means of ten nets, by E4 A."""
    theirs = published("initialisation")[setting, SQUARES].value or 0.0
    if theirs:
        tail = 2 * min((means <= theirs).mean(), (means >= theirs).mean())
    else:
        tail = 2 * (means < ROUNDS_TO_ZERO).mean()
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return Claim(
        f"{setting}: the notebook's mean squared singular value over ten nets, {theirs}",
        "NB-TX",
        True if tail >= LEVEL else False if tail < LEVEL / len(NETS) else None,
        f"two-sided p = {min(tail, 1):.2f} among our means over ten nets, of which the interval "
        "holds 95 %",
        count,
        (float(low), float(high)),
        weak=bool(high > INFORMATIVE * low),
    )


def _appendix(spectra: Mapping[str, np.ndarray]) -> list[Claim]:
    """E4 B."""
    vanishing = (spectra[LAYER_NORM] < 1e-3).sum(1)
    rank = (spectra[UNIFORM] > 1e-5).sum(1)
    cases = (
        ("LayerNorm has two vanishing singular values for each token", vanishing, 2 * TOKENS),
        ("Uniform attention leaves only d of n d singular values", rank, WIDTH),
    )
    claims = []
    for text, found, expected in cases:
        count, n = int((found == expected).sum()), len(found)
        evidence = f"{expected} of {TOKENS * WIDTH} in {count} of {n} draws"
        claims.append(Claim(text, "SUP 1", all_or_none(count, n), evidence, n))
    return claims


def _equation_7(residual: np.ndarray, rezero: np.ndarray) -> list[Claim]:
    """E4 C."""
    layers = np.array(LAYERS)
    slope = np.polyfit(layers - 1, np.log(layers * residual), 1)[0]
    power = np.polyfit(np.log(layers), np.log(rezero), 1)[0]
    gap = rezero[-1] / residual[-1]
    make = partial(Claim, source="UAI 4, equation 7", n=len(layers))
    return [
        make(
            "Without gates the largest learning rate falls as 2^-(L-1) / L",
            holds=bool(abs(slope / np.log(2) + 1) <= 0.05),
            evidence=f"slope of ln(L rate) over L - 1 is {number(slope)}, -ln 2 is -0.6931; exact",
        ),
        make(
            "With ReZero the largest learning rate does not fall exponentially",
            holds=bool(gap > 1e6 and -3 < power < -1),
            evidence=f"it falls as L to the {number(power)}, and is {number(gap)} times that of "
            f"the residual net at {layers[-1]} layers; exact",
        ),
    ]


def plot(results: Results) -> Figure:
    """A panel for each part."""
    figure, axes = drawing.sheet_of(results, panels=3, height=3.6)
    _plot_nets(axes[0], results)
    for name, colour in drawing.colours((LAYER_NORM, UNIFORM, XAVIER)).items():
        middle, low, high = (results.curves[name + mark] for mark in ("", ", low", ", high"))
        axes[1].fill_between(middle.x, low.y, high.y, color=colour, alpha=0.25, lw=0)
        axes[1].plot(middle.x, middle.y, color=colour, label=name, marker=".", ms=3, lw=1)
    axes[1].set(yscale="log", ylim=(1e-9, 2), title="one layer, 4 tokens of width 16")
    axes[1].set(xlabel="index of the singular value", ylabel="over the largest")
    axes[1].legend(fontsize=7, loc="lower left")
    residual = results.curves["residual"]
    for name, colour in (("residual", COLOURS[1]), ("ReZero", COLOURS[0])):
        drawing.line(axes[2], results.curves[name], f"{name}, found", colour)
        axes[2].lines[-1].set(marker="o", ls="")
    layers = np.array(residual.x)
    bound = residual.y[0] * layers[0] / layers * 2.0 ** (layers[0] - layers)
    axes[2].plot(layers, bound, "--", color=drawing.GREY, lw=1, label="2^-(L-1) / L, to the first")
    axes[2].set(yscale="log", xlabel="layers L", ylabel="largest stable rate", title="toy net")
    axes[2].legend(fontsize=7)
    return figure


def _plot_nets(axis: Axes, results: Results) -> None:
    names = [f"{rule}, {depth} layers" for rule, depth in NETS]
    for place, name in enumerate(names):
        low, mean, high = results.curves[name].y
        floor = ROUNDS_TO_ZERO / 10
        axis.plot(
            [place] * 2, [max(low, floor), max(high, floor)], color=COLOURS[0], lw=4, alpha=0.4
        )
        axis.plot(place, mean, "o", color=COLOURS[0], label="" if place else "ours")
        theirs = published("initialisation")[name, SQUARES].value or ROUNDS_TO_ZERO
        axis.plot(place, theirs, "x", color="black", label="" if place else "notebook")
    short = [name.replace(", ", "\n").replace(" layers", "") for name in names]
    axis.set_xticks(range(len(names)), short, fontsize=7)
    axis.set(yscale="log", ylabel=SQUARES, title="Transformers, means over ten nets")
    axis.legend(fontsize=7)
