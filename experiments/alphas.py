"""Figure 8: every |alpha| by layer and step, and whether it shows the pattern of the paper.

The runs are those of transformer12 and transformer_deep.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from experiments import drawing
from experiments.published import curve
from experiments.results import ALPHA_AT_END, Curve, Results, Runs
from rezero_jax.analysis.gates import Gates

SHALLOW, OPEN, DEEP = "alpha = 0, 12 layers", "alpha = 1, 12 layers", "alpha = 0, 64 layers"
AFTER = "mean |alpha| after iteration"


def _order_of_peaks(gates: Gates) -> float:
    """Rank correlation of layer and update of the peak, without gates that still grow; or NaN."""
    past = np.flatnonzero(gates.peak_steps < gates.steps[-1])
    peaks = gates.peak_steps[past]
    return float(spearmanr(past, peaks)[0]) if len(set(peaks)) > 1 else np.nan


def _upper_share(gates: Gates) -> float:
    """The upper half's share of the sum of |alpha| when their mean is first at half of its peak."""
    means, layers = gates.mean_abs, gates.alphas.shape[1]
    early = gates.alphas[np.argmax(means >= means.max() / 2)]
    return float(early[layers // 2 :].sum() / early.sum())


def _after(gates: Gates, step: float) -> float:
    """The mean |alpha| at a step, or at the end of a shorter run."""
    return gates.mean_abs[np.argmax(gates.steps >= min(step, gates.steps[-1]))]


def _variation(gates: Gates) -> float:
    return gates.alphas[-1].std() / gates.alphas[-1].mean()


_ONE_OVER_L = (
    "the mean |alpha| at the end is about 1/L",
    "L times the mean, 0.5 to 2",
    lambda gates: gates.alphas.shape[1] * gates.mean_abs[-1],
    *(0.5, 2),
)
# By setting, sentences of the paper, and a number of each run with the bounds that decide them.
PATTERNS: dict[str, list[tuple[str, str, Callable[[Gates], float], float, float]]] = {
    SHALLOW: [_ONE_OVER_L],  # of this and DEEP the paper prints 1.08 and 1.18
    OPEN: [
        (
            "gates that start at 1 are pushed down in the first 50 iterations",
            "the mean |alpha| after 50",
            partial(_after, step=50),
            *(-np.inf, 1),
        )
    ],
    DEEP: [  # the paper's map
        (
            "the mean |alpha| rises fast to a peak",
            "its peak as a fraction of the run, below a half",
            lambda gates: gates.steps[gates.mean_abs.argmax()] / gates.steps[-1],
            *(-np.inf, 0.5),
        ),
        (
            "the mean |alpha| decays after its peak",
            "the end over the peak, below 0.75",
            lambda gates: gates.mean_abs[-1] / gates.mean_abs.max(),
            *(-np.inf, 0.75),
        ),
        (
            "higher layers peak earlier",
            "rank correlation of layer and update of the peak, of the layers past theirs",
            _order_of_peaks,
            *(-np.inf, 0),
        ),
        (
            "higher layers dominate early",
            "share of the upper half when the mean is first at half of its peak",
            _upper_share,
            *(0.5, np.inf),
        ),
        (
            "at the end the layers are used about equally",
            "deviation over mean of the layers, below 0.5",
            _variation,
            *(-np.inf, 0.5),
        ),
        _ONE_OVER_L,
    ],
}


def measure(results: Results, runs: Runs) -> None:
    """The mean of |alpha| by step and at the end, and the order in which the layers peak."""
    for setting, seeds in runs.items():
        if not all(run.lines for run in seeds):  # a run diverged before it logged anything
            results.add(setting, ALPHA_AT_END, (None,) * len(seeds))
            continue
        found = [Gates(g.steps, np.abs(g.alphas)) for g in map(Gates.of_run, seeds)]
        layers, means = found[0].alphas.shape[1], [gates.mean_abs[-1] for gates in found]
        results.add(setting, ALPHA_AT_END, means)
        results.add(setting, "times L", (layers * mean for mean in means))
        results.add(setting, "variation over layers", map(_variation, found))
        for mark, _ in curve("alphas", setting, AFTER):
            if all(gates.steps[-1] >= mark for gates in found):
                then = (_after(gates, mark) for gates in found)
                results.add(setting, f"{AFTER} {int(mark)}", then)
        shortest = min(len(gates.steps) for gates in found)
        mean = np.mean([gates.alphas[:shortest] for gates in found], axis=0)
        rounded = [[round(alpha, 6) for alpha in line] for line in mean.tolist()]
        results.curves[setting] = Curve(found[0].steps[:shortest].tolist(), rounded)
        for text, quantity, of, *bounds in PATTERNS.get(setting, ()):
            text = f"{setting.partition(', ')[2]}: {text}"
            results.bounded(text, "UAI 8", quantity, [float(of(g)) for g in found], *bounds)


def plot(results: Results) -> Figure:
    """A heat map of |alpha| for each net, and the means with the paper's as crosses."""
    panels = len(results.curves) + 1
    figure, axes = drawing.sheet_of(results, panels, height=3.6)
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
        drawing.line(axes[-1], Curve(drawn.x, gates.mean(1).tolist()), name, colour)
        if results.scale == "paper":
            drawing.crosses(axes[-1], curve("alphas", setting, AFTER), colour, until=drawn.x[-1])
    axes[-1].set(xlabel="update", ylabel="mean |alpha|", yscale="log", title="means")
    drawing.legend(axes[-1])
    return figure
