"""Figure 8: every |alpha| by layer and step, and whether it shows the pattern of the paper.

The runs are those of transformer12 and transformer_deep.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from experiments import drawing, transformer12, transformer_deep
from experiments.jobs import Job
from experiments.published import curve
from experiments.results import Claim, Curve, Results, Row
from rezero_jax.analysis.gates import Gates
from rezero_jax.formatting import number
from rezero_jax.runs.reader import Run

TITLE = "Trajectories of the gates"
SOURCE = "UAI Figure 8"
SEEDS = 1
SETTING = {
    "paper": "The 12-, 64- and 128-layer Transformers on enwik8.",
    "cpu": "Reduced: the 12-layer Transformers of transformer12 (500 iterations, LAMB) and the 64- "
    "and 128-layer ones of transformer_deep (200 updates, Adagrad).",
    "smoke": "Reduced: the 2-layer Transformers of the other smoke tests.",
}

SHALLOW, OPEN = "alpha = 0, 12 layers", "alpha = 1, 12 layers"
DEEP, DEEPEST = "alpha = 0, 64 layers", "alpha = 0, 128 layers"
FIRST = 50  # iterations in which gates that start at 1 shrink, says the paper
NOTES = (
    "The paper shows the map of 64 layers only. The units of its axis are doubtful: under LAMB "
    "at 0.0087 a gate cannot reach 0.49 in 116 updates. Of several runs the map and what is "
    "read from it are of their mean |alpha|.",
)


def runs(scale: str) -> list[Job]:
    """The Transformers with gates."""
    jobs = {
        SHALLOW: transformer12.job("ReZero alpha = 0", scale),
        OPEN: transformer12.job("ReZero alpha = 1", scale),
        DEEP: transformer_deep.job("ReZero alpha = 0, 64 layers", scale),
        DEEPEST: transformer_deep.job("ReZero alpha = 0, 128 layers", scale),
    }
    if scale == "smoke":
        del jobs[DEEPEST]
    return [job._replace(setting=setting) for setting, job in jobs.items()]


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The mean of |alpha| by step and at the end, and the order in which the layers peak."""
    make = partial(Row, reduced=scale != "paper")
    rows: list[Row] = []
    claims: list[Claim] = []
    curves = {}
    for setting, seeds in runs.items():
        if not all(run.lines for run in seeds):  # one diverged before it logged anything
            none = (None,) * len(seeds)
            rows.append(make(setting, "mean |alpha| at the end", none, missing="diverged"))
            continue
        found = [Gates.of_run(run) for run in seeds]
        ends = [np.abs(gates.alphas[-1]) for gates in found]
        layers, means = len(ends[0]), tuple(end.mean() for end in ends)
        rows += [
            make(setting, "mean |alpha| at the end", means, setting != OPEN),
            make(setting, "times L", tuple(layers * mean for mean in means)),
            make(setting, "variation over layers", tuple(end.std() / end.mean() for end in ends)),
        ]
        for mark, _ in curve("alphas", setting, "mean |alpha| after iteration"):
            if all(gates.steps[-1] >= mark for gates in found):
                then = tuple(g.mean_abs[np.argmax(g.steps >= mark)] for g in found)
                rows.append(make(setting, f"mean |alpha| after iteration {int(mark)}", then))
        shortest = min(len(gates.steps) for gates in found)
        mean = Gates(
            found[0].steps[:shortest],
            np.mean([np.abs(gates.alphas[:shortest]) for gates in found], axis=0),
        )
        rounded = [[round(alpha, 6) for alpha in line] for line in mean.alphas.tolist()]
        curves[setting] = Curve(mean.steps.tolist(), rounded)
        claims += [_opened(mean)] if setting == OPEN else _pattern(setting, mean)
    return Results("alphas", scale, rows, claims, curves)


def _pattern(setting: str, gates: Gates) -> list[Claim]:
    """The paper's sentences on gates that start at 0, tested on |alpha|."""
    means, steps, layers = gates.mean_abs, gates.steps, gates.alphas.shape[1]
    peak, order, last = int(means.argmax()), gates.peak_steps, gates.alphas[-1]
    rho, p = spearmanr(np.arange(layers), order) if len(set(order)) > 1 else (0.0, 1.0)
    early = gates.alphas[np.argmax(means >= means[peak] / 2)]
    upper = early[layers // 2 :].sum() / early.sum()
    variation = last.std() / last.mean()
    product = layers * means[-1]
    told = [
        (
            "the mean |alpha| rises fast to a peak and then decays",
            steps[peak] < steps[-1] / 2 and means[-1] < 0.75 * means[peak],
            f"peak {number(means[peak])} after {steps[peak]:.0f} of {steps[-1]:.0f} updates, "
            f"{number(means[-1])} at the end (a peak in the first half, and a fall by a quarter)",
        ),
        (
            "higher layers peak earlier",
            bool(rho < 0) if p < 0.01 else None,
            f"rank correlation of layer and update of the peak {rho:.2f}, p = {p:.1g}",
        ),
        (
            "higher layers dominate early",
            bool(upper > 0.5),
            f"the upper half has {upper:.0%} of the sum when the mean is first at half of its peak "
            "(more than half)",
        ),
        (
            "at the end the layers are used about equally",
            bool(variation < 0.5),
            f"deviation over mean of the layers {variation:.2f} (below 0.5)",
        ),
        (
            "the mean |alpha| at the end is about 1/L",
            bool(0.5 < product < 2),
            f"L times the mean is {number(product)} (0.5 to 2; the paper's are 1.08 and 1.18)",
        ),
    ]
    layers_named = setting.partition(", ")[2]
    return [
        Claim(f"{layers_named}: {text}", "UAI 8", None if holds is None else bool(holds), evidence)
        for text, holds, evidence in told
    ]


def _opened(gates: Gates) -> Claim:
    """The paper's sentence on gates that start at 1."""
    at = int(np.argmax(gates.steps >= min(FIRST, gates.steps[-1])))
    mean = gates.mean_abs[at]
    return Claim(
        f"Gates that start at 1 are pushed down in the first {FIRST} iterations",
        "UAI 8",
        bool(mean < 1),
        f"the mean |alpha| is {number(mean)} after {gates.steps[at]:.0f}",
    )


def plot(results: Results) -> Figure:
    """A heat map of |alpha| for each net, and the means with the paper's as crosses."""
    panels = len(results.curves) + 1
    figure, axes = drawing.sheet(TITLE, results.scale, SETTING[results.scale], panels, height=3.6)
    for (setting, colour), axis in zip(drawing.colours(results.curves).items(), axes, strict=False):
        drawn = results.curves[setting]
        gates = np.array(drawn.y)
        layers = np.arange(1, gates.shape[1] + 1)
        mesh = axis.pcolormesh(
            drawn.x, layers, gates.T, cmap="magma", shading="nearest", rasterized=True
        )
        figure.colorbar(mesh, ax=axis, label="|alpha|")
        axis.grid(False)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        name = f"{setting.partition(',')[0]}, {len(layers)} layers"  # a smoke test has fewer
        axis.set(title=name, xlabel="update", ylabel="layer")
        means = Curve(drawn.x, gates.mean(1).tolist())
        drawing.line(axes[-1], means, name, colour)
        figure_8 = curve("alphas", setting, "mean |alpha| after iteration")
        drawing.crosses(axes[-1], figure_8, colour, until=drawn.x[-1])
    axes[-1].set(xlabel="update", ylabel="mean |alpha|", yscale="log", title="means")
    axes[-1].legend(fontsize=8)
    return figure
