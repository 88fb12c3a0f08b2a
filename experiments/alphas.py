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
from experiments.claims import Claim, bounded
from experiments.jobs import Job
from experiments.published import curve
from experiments.results import Curve, Results, Row
from rezero_jax.analysis.gates import Gates
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
    "at 0.0087 a gate cannot reach 0.49 in 116 updates. Of several runs the map is of their mean "
    "|alpha|. Adagrad's first step moves every gate by the learning rate, whatever its gradient: "
    "L times the mean is L times that rate after one update.",
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
        found = [_absolute(Gates.of_run(run)) for run in seeds]
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
        claims += _claims(setting, found, scale != "paper")
    return Results("alphas", scale, rows, claims, curves)


def _absolute(gates: Gates) -> Gates:
    return Gates(gates.steps, np.abs(gates.alphas))


def _claims(setting: str, found: Sequence[Gates], reduced: bool) -> list[Claim]:
    """The paper's sentences on a net, by a number of each run's |alpha|."""
    layers_named = setting.partition(", ")[2]

    def claim(text: str, quantity: str, draws: Sequence[float | None], **bounds: float) -> Claim:
        text = f"{layers_named}: {text}"
        return bounded(text, "UAI 8", quantity, draws, reduced=reduced, seeds=SEEDS, **bounds)

    if setting == OPEN:
        at = [int(np.argmax(gates.steps >= min(FIRST, gates.steps[-1]))) for gates in found]
        return [
            claim(
                f"gates that start at 1 are pushed down in the first {FIRST} iterations",
                f"the mean |alpha| after {found[0].steps[at[0]]:.0f}",
                [gates.mean_abs[i] for gates, i in zip(found, at, strict=True)],
                high=1,
            )
        ]
    claims = []
    if setting == DEEP:  # the paper's map shows 64 layers
        claims += [
            claim(
                "the mean |alpha| rises fast to a peak",
                "its peak as a fraction of the run, below a half",
                [gates.steps[gates.mean_abs.argmax()] / gates.steps[-1] for gates in found],
                high=0.5,
            ),
            claim(
                "the mean |alpha| decays after its peak",
                "the end over the peak, below 0.75",
                [gates.mean_abs[-1] / gates.mean_abs.max() for gates in found],
                high=0.75,
            ),
            claim(
                "higher layers peak earlier",
                "rank correlation of layer and update of the peak, of the layers past theirs",
                [_order_of_peaks(gates) for gates in found],
                high=0,
            ),
            claim(
                "higher layers dominate early",
                "share of the upper half when the mean is first at half of its peak",
                [_upper_share(gates) for gates in found],
                low=0.5,
            ),
            claim(
                "at the end the layers are used about equally",
                "deviation over mean of the layers, below 0.5",
                [gates.alphas[-1].std() / gates.alphas[-1].mean() for gates in found],
                high=0.5,
            ),
        ]
    if setting in (SHALLOW, DEEP):  # of which the paper prints 1.08 and 1.18
        claims.append(
            claim(
                "the mean |alpha| at the end is about 1/L",
                "L times the mean, 0.5 to 2",
                [gates.alphas.shape[1] * gates.mean_abs[-1] for gates in found],
                low=0.5,
                high=2,
            )
        )
    return claims


def _order_of_peaks(gates: Gates) -> float | None:
    """Rank correlation of layer and update of the peak; None if it is undefined.

    A gate that is largest at the end has not peaked yet: its peak is censored, and it is left out.
    """
    past = np.flatnonzero(gates.peak_steps < gates.steps[-1])
    peaks = gates.peak_steps[past]
    return float(spearmanr(past, peaks)[0]) if len(set(peaks)) > 1 else None


def _upper_share(gates: Gates) -> float:
    """Of the sum of |alpha| when their mean is first at half of its peak."""
    means, layers = gates.mean_abs, gates.alphas.shape[1]
    early = gates.alphas[np.argmax(means >= means.max() / 2)]
    return float(early[layers // 2 :].sum() / early.sum())


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
        if results.scale == "paper":
            figure_8 = curve("alphas", setting, "mean |alpha| after iteration")
            drawing.crosses(axes[-1], figure_8, colour, until=drawn.x[-1])
    axes[-1].set(xlabel="update", ylabel="mean |alpha|", yscale="log", title="means")
    axes[-1].legend(fontsize=8)
    return figure
