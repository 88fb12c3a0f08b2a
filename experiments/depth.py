"""ReZero nets of 1 to 10,000 fully connected layers, beside one whose gates are frozen at 0."""

import math

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.jobs import CONTROL
from experiments.results import ALPHA_AT_END, Curve, Results, Runs, gates_at_end
from rezero_jax.analysis.theme import COLOURS
from rezero_jax.runs.reader import Run

CHANCE = math.log(10)  # nats, of uniform guessing
FITTED = 99.0  # % of training images classified correctly, from which a net counts as overfitted


def _late(run: Run, key: str) -> float:
    """The mean of the values logged in the last tenth of a run."""
    steps, values = run.series(key)
    return float(values[steps > 0.9 * steps[-1]].mean())


def measure(results: Results, runs: Runs) -> None:
    """The losses and accuracies of each depth, and the size of its gates."""
    deepest = [setting for setting in runs if setting != CONTROL][-1]
    loss, accuracy = "training loss at the end", "training accuracy % at the end"
    for setting, seeds in runs.items():
        finals = [run.final() for run in seeds]
        size = float(finals[0]["parameters"])  # every seed's
        results.add(setting, "parameters", (size,), reduced=False)
        results.add(setting, loss, (_late(run, "train/loss") for run in seeds))
        results.add(setting, accuracy, (100 * _late(run, "train/accuracy") for run in seeds))
        results.add(setting, "test loss", (final["eval/loss"] for final in finals))
        results.add(setting, "test accuracy %", (100 * f["eval/accuracy"] for f in finals))
        results.add(setting, ALPHA_AT_END, gates_at_end(seeds))
        results.curves[setting] = Curve.logged(seeds)
    gap = "training loss minus the control's"
    for setting in runs:
        if setting != CONTROL:
            results.add(setting, gap, results.differences(loss, setting, CONTROL))
    text = "ReZero nets of up to 10,000 layers can be trained"
    gaps = results.row(deepest, gap).draws
    quantity = f"training loss of {deepest} minus that of the net with {CONTROL}"
    results.bounded(text, "UAI 6", quantity, gaps, high=0)
    text = "ReZero nets of 10,000 layers overfit the training set"
    draws = results.row(deepest, accuracy).draws
    quantity = f"training accuracy (%) of {deepest}, above {FITTED}"
    results.bounded(text, "UAI 6, footnote 2", quantity, draws, low=FITTED)


def plot(results: Results) -> Figure:
    """The smoothed loss by update of each depth, and the test loss at the end."""
    figure, (left, right) = drawing.sheet_of(results, panels=2)
    for setting, colour in drawing.colours(results.curves).items():
        drawing.line(left, drawing.smoothed(results.curves[setting]), setting, colour)
    drawing.target(left, CHANCE)
    left.set(xlabel="update", ylabel="training cross entropy (nats)")
    drawing.legend(left)
    ends = {row.setting: row.mean for row in results.rows if row.metric == "test loss"}
    drawing.levels(right, {CONTROL: held} if (held := ends.pop(CONTROL)) else {})
    depths = [int(setting.split()[0].replace(",", "")) for setting in ends]
    right.plot(depths, [end or np.nan for end in ends.values()], color=COLOURS[0], marker="o")
    drawing.size_axis(right, depths, "layers")
    right.set(ylabel="test cross entropy at the end (nats)")
    return figure
