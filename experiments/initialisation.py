"""Networks at initialisation and the toy net's learning rates: protocol.md's E4, without runs."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing, spectra
from experiments.published import INFORMATIVE, published
from experiments.results import Curve, Results
from experiments.spectra import SQUARES, TOKENS, WIDTH
from experiments.statistics import LEVEL
from experiments.toy import largest_stable_rate
from rezero_jax.analysis.theme import COLOURS
from rezero_jax.formatting import number

COUNT = {"paper": 1000, "cpu": 1000, "smoke": 20}  # networks
NETS = [f"{rule}, {depth} layers" for depth in (12, 128) for rule in spectra.RULES]
ROUNDS_TO_ZERO = 0.0005  # below it a number prints as 0.000
LAYERS = range(10, 41, 5)  # of the toy net
LAYER_NORM, UNIFORM, XAVIER = "LayerNorm", "uniform attention", "attention at initialisation"


def measure(results: Results, runs: Any) -> None:
    """Parts A, B and C of E4."""
    count = COUNT[results.scale]
    for setting in NETS:
        rule, depth = setting.removesuffix(" layers").split(", ")
        values = spectra.mean_squares(rule, int(depth), count)
        results.add(setting, SQUARES, values.tolist())
        results.add(setting, f"median of the {SQUARES}", (float(np.median(values)),))
        means = means_of_ten(values)
        low, high = judge_notebook(results, setting, means, count)
        results.curves[setting] = Curve([0, 1, 2], [low, float(values.mean()), high])
    found = {
        LAYER_NORM: spectra.layer_norm(count),
        UNIFORM: spectra.attention(count, uniform=True),
        XAVIER: spectra.attention(count, uniform=False),
    }
    for name, values in found.items():
        indices = np.arange(1.0, values.shape[1] + 1).tolist()
        for mark, quantile in (("", 0.5), (", low", 0.025), (", high", 0.975)):
            quantiles = np.quantile(values, quantile, axis=0)
            results.curves[name + mark] = Curve(indices, quantiles.tolist())
    squares = found[XAVIER] ** 2
    metric = f"share of the {WIDTH} largest in the sum of squares"
    results.add(XAVIER, metric, (squares[:, :WIDTH].sum(1) / squares.sum(1)).tolist())
    _judge_appendix(results, (found[LAYER_NORM] < 1e-3).sum(1), (found[UNIFORM] > 1e-5).sum(1))
    for name, gated in (("residual", False), ("ReZero", True)):
        rates = [largest_stable_rate(layers, gated=gated) for layers in LAYERS]
        results.curves[name] = Curve(list(LAYERS), rates)
        for layers, rate in zip(LAYERS, rates, strict=True):
            metric = f"largest stable rate at {layers} layers"
            results.add(f"toy net, {name}", metric, (rate,), reduced=False)
    judge_equation_7(results)


def means_of_ten(values: np.ndarray, draws: int = 10_000) -> np.ndarray:
    """Means of ten of the values, drawn with replacement, ascending."""
    return np.sort(np.random.default_rng(0).choice(values, (draws, 10)).mean(axis=1))


def judge_notebook(
    results: Results, setting: str, means: np.ndarray, count: int
) -> tuple[float, float]:
    """E4 A: is the notebook's number one of the means of ten nets? Returns their 95 % interval."""
    theirs = published("initialisation")[setting, SQUARES].value or 0.0
    if theirs:
        tail = 2 * min((means <= theirs).mean(), (means >= theirs).mean())
    else:
        tail = 2 * (means < ROUNDS_TO_ZERO).mean()
    low, high = map(float, np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2]))
    text = f"{setting}: the notebook's mean squared singular value over ten nets, {theirs}"
    found = True if tail >= LEVEL else False if tail < LEVEL / len(NETS) else None
    evidence = f"two-sided p = {min(tail, 1):.2f} among our means over ten nets, of which the "
    evidence += "interval holds 95 %"
    fields: Any = {"interval": (low, high), "weak": high > INFORMATIVE * low}
    results.claim(text, "NB-TX", found, evidence, count, **fields)
    return low, high


def _judge_appendix(results: Results, vanishing: np.ndarray, rank: np.ndarray) -> None:
    """E4 B, by the number of singular values in each draw."""
    for text, found, expected in (
        ("LayerNorm has two vanishing singular values for each token", vanishing, 2 * TOKENS),
        ("Uniform attention leaves only d of n d singular values", rank, WIDTH),
    ):
        count, n = int((found == expected).sum()), len(found)
        evidence = f"{expected} of {TOKENS * WIDTH} in {count} of {n} draws"
        results.counted(text, "SUP 1", evidence, count, n)


def judge_equation_7(results: Results) -> None:
    """E4 C."""
    layers = np.array(LAYERS)
    residual, rezero = (np.array(results.curves[name].y) for name in ("residual", "ReZero"))
    slope = np.polyfit(layers - 1, np.log(layers * residual), 1)[0]
    source, n = "UAI 4, equation 7", len(layers)
    text = "Without gates the largest learning rate falls as 2^-(L-1) / L"
    found = bool(abs(slope / np.log(2) + 1) <= 0.05)
    evidence = f"slope of ln(L rate) over L - 1 is {number(slope)}, -ln 2 is -0.6931; exact"
    results.claim(text, source, found, evidence, n, reduced=False)
    power, gap = np.polyfit(np.log(layers), np.log(rezero), 1)[0], rezero[-1] / residual[-1]
    text = "With ReZero the largest learning rate does not fall exponentially"
    found = bool(gap > 1e6 and -3 < power < -1)
    evidence = f"it falls as L to the {number(power)}, and is {number(gap)} times that of "
    evidence += f"the residual net at {layers[-1]} layers; exact"
    results.claim(text, source, found, evidence, n, reduced=False)


def plot(results: Results) -> Figure:
    """A panel for each part."""
    figure, axes = drawing.sheet_of(results, panels=3, height=3.6)
    axis = axes[0]
    for place, name in enumerate(NETS):
        low, mean, high = results.curves[name].y
        ends = [max(end, ROUNDS_TO_ZERO / 10) for end in (low, high)]
        axis.plot([place] * 2, ends, color=COLOURS[0], lw=4, alpha=0.4)
        axis.plot(place, mean, "o", color=COLOURS[0])
        theirs = published("initialisation")[name, SQUARES].value or ROUNDS_TO_ZERO
        axis.plot(place, theirs, "x", color="black")
    short = [name.replace(", ", "\n").replace(" layers", "") for name in NETS]
    axis.set_xticks(range(len(NETS)), short, fontsize=7)
    axis.set(yscale="log", ylabel=SQUARES)
    axis.set_title("Transformers, means over ten nets:\ndots ours, crosses the notebook's")
    for name, colour in drawing.colours((LAYER_NORM, UNIFORM, XAVIER)).items():
        middle, low, high = (results.curves[name + mark] for mark in ("", ", low", ", high"))
        axes[1].fill_between(middle.x, low.y, high.y, color=colour, alpha=0.25, lw=0)
        axes[1].plot(middle.x, middle.y, color=colour, label=name, marker=".", ms=3, lw=1)
    axes[1].set(yscale="log", ylim=(1e-9, 2), title="one layer, 4 tokens of width 16")
    axes[1].set(xlabel="index of the singular value", ylabel="over the largest")
    drawing.legend(axes[1])
    residual = results.curves["residual"]
    for name, colour in (("residual", COLOURS[1]), ("ReZero", COLOURS[0])):
        drawing.line(axes[2], results.curves[name], f"{name}, found", colour)
        axes[2].lines[-1].set(marker="o", ls="")
    layers = np.array(residual.x)
    bound = residual.y[0] * layers[0] / layers * 2.0 ** (layers[0] - layers)
    axes[2].plot(layers, bound, "--", color=drawing.GREY, lw=1, label="2^-(L-1) / L, to the first")
    axes[2].set(yscale="log", xlabel="layers L", ylabel="largest stable rate", title="toy net")
    drawing.legend(axes[2])
    return figure
