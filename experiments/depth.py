"""ReZero nets of 1 to 10,000 fully connected layers, beside one whose gates stay at 0."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import bounded, paired
from experiments.jobs import CONTROL, HELD, Job
from experiments.results import Curve, Results, Row, find
from rezero_jax.analysis.plots.theme import COLOURS
from rezero_jax.runs.reader import Run

TITLE = "The depth of fully connected ReZero networks"
SOURCE = "UAI section 4, footnote 2"
SEEDS = 1
SETTING = {
    "paper": "1 to 10,000 layers of width 150 on CIFAR-10, batches of 100, Adagrad 0.003, 25 "
    "epochs (the authors' notebook).",
    "cpu": "Reduced: 1 to 10,000 layers on CIFAR-10 for 320 updates (0.64 epochs) instead of 25 "
    "epochs; all else is the notebook's.",
    "smoke": "Reduced: 1 and 8 layers of width 8 on scikit-learn's digits, an epoch.",
}

DEPTHS = {"paper": (1, 10, 100, 1000, 10000), "cpu": (1, 10, 100, 1000, 10000), "smoke": (1, 8)}
SHORT = (
    "train.epochs=None",
    "train.steps=320",
    "checkpoint.every_steps=150",
    "checkpoint.keep=1",
    "log.every_steps=5",
)
CHANCE = math.log(10)  # nats, of uniform guessing
FITTED = 99.0  # % of training images right from which on a net counts as overfitted
NOTES = (
    "With every alpha held at 0 the layers do nothing at any depth, so the control has one: it is "
    "the net's first and last layer. A deep net learns if its training loss is lower than that.",
    "The paper says that such nets were trained on one laptop, and gives no loss; the authors' "
    "notebook holds the 10,000-layer net without its output. Losses and training accuracies "
    "are means over the last tenth of the run.",
)


def name(depth: int) -> str:
    """What the report calls a depth."""
    return f"{depth:,} layer{'s' * (depth > 1)}"


def runs(scale: str) -> list[Job]:
    """One of each depth, and the control."""
    jobs = []
    for depth in DEPTHS[scale]:
        config = f"mlp.py:depth={depth},width=150,lr=0.003,dataset=cifar10"
        command: tuple[str, tuple[str, ...]] = {
            "paper": (f"{config},epochs=25", ("checkpoint.keep=1",)),
            "cpu": (config, SHORT),
            "smoke": ("mlp.py:smoke,epochs=1", (f"model.depth={depth}",)),
        }[scale]
        jobs.append(Job(name(depth), f"fc{depth}", *command))
    config, overrides = jobs[0].config, (*jobs[0].overrides, *HELD)
    return [*jobs, Job(CONTROL, "fc1-held", config, overrides)]


def _late(run: Run, key: str) -> float:
    """The mean of the values logged in the last tenth of a run."""
    steps, values = run.series(key)
    return float(values[steps > 0.9 * steps[-1]].mean())


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The losses and accuracies of each depth, and how far its gates have moved."""
    deepest, make = name(DEPTHS[scale][-1]), partial(Row, reduced=scale != "paper")
    rows, curves = [], {}
    for setting, seeds in runs.items():
        finals = [run.final() for run in seeds]
        losses = tuple(_late(run, "train/loss") for run in seeds)
        accuracies = tuple(100 * _late(run, "train/accuracy") for run in seeds)
        gates = tuple(float(np.abs(run.alphas()[1][-1]).mean()) for run in seeds)
        rows += [
            Row(setting, "parameters", tuple(float(final["parameters"]) for final in finals)),
            make(setting, "training loss at the end", losses, setting == deepest),
            make(setting, "training accuracy % at the end", accuracies),
            make(setting, "test loss", tuple(final["eval/loss"] for final in finals)),
            make(setting, "test accuracy %", tuple(100 * f["eval/accuracy"] for f in finals)),
            make(setting, "mean |alpha| at the end", gates),
        ]
        curves[setting] = Curve.of_runs([run.series("train/loss") for run in seeds])
    deep, control = (
        find(rows, setting, "training loss at the end").ours for setting in (deepest, CONTROL)
    )
    judged = partial(bounded, reduced=scale != "paper", seeds=SEEDS)
    claims = [
        judged(
            "ReZero nets of up to 10,000 layers can be trained",
            "UAI 6",
            f"training loss of {deepest} less that of the net with {CONTROL}",
            paired(deep, control),
            high=0,
        ),
        judged(
            "ReZero nets of 10,000 layers overfit the training set",
            "UAI 6, footnote 2",
            f"training accuracy (%) of {deepest}, above {FITTED}",
            find(rows, deepest, "training accuracy % at the end").ours,
            low=FITTED,
        ),
    ]
    return Results("depth", scale, rows, claims, curves)


def plot(results: Results) -> Figure:
    """The loss by update of each depth, smoothed, and the test loss at the end."""
    figure, (left, right) = drawing.sheet(TITLE, results.scale, SETTING[results.scale], panels=2)
    for setting, colour in drawing.colours(results.curves).items():
        drawing.line(left, drawing.smoothed(results.curves[setting]), setting, colour)
    left.axhline(CHANCE, color="#888888", lw=0.8, ls=":")
    left.set(xlabel="update", ylabel="training cross entropy (nats)")
    left.legend()
    ends = [row for row in results.rows if row.quantity == "test loss"]
    held = next(row for row in ends if row.setting == CONTROL)
    drawing.levels(right, {CONTROL: held.mean} if held.mean else {})
    ends.remove(held)
    depths = [int(row.setting.split()[0].replace(",", "")) for row in ends]
    right.plot(depths, [row.mean or np.nan for row in ends], color=COLOURS[0], marker="o")
    right.set(xlabel="layers", ylabel="test cross entropy at the end (nats)", xscale="log")
    right.set_xticks(depths, map(str, depths))
    right.minorticks_off()
    return figure
