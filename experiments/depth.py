"""ReZero nets of 1 to 10,000 fully connected layers, beside one whose gates are frozen at 0."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import bounded
from experiments.jobs import CONTROL, FROZEN, Job
from experiments.results import Results, Row, find, gates_at_end, training_curve
from experiments.statistics import paired
from rezero_jax.analysis.theme import COLOURS
from rezero_jax.runs.reader import Run

DEPTHS = {"paper": (1, 10, 100, 1000, 10000), "cpu": (1, 10, 100, 1000, 10000), "smoke": (1, 8)}
SHORT = (
    "train.epochs=None",
    "train.steps=320",
    "checkpoint.every_steps=150",
    "checkpoint.keep=1",
    "log.every_steps=5",
)
CHANCE = math.log(10)  # nats, of uniform guessing
FITTED = 99.0  # % of training images classified correctly, from which a net counts as overfitted


def name(depth: int) -> str:
    """The setting of a depth."""
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
    config, overrides = jobs[0].config, (*jobs[0].overrides, *FROZEN)
    return [*jobs, Job(CONTROL, "fc1-frozen", config, overrides)]


def _late(run: Run, key: str) -> float:
    """The mean of the values logged in the last tenth of a run."""
    steps, values = run.series(key)
    return float(values[steps > 0.9 * steps[-1]].mean())


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The losses and accuracies of each depth, and the size of its gates."""
    deepest, make = name(DEPTHS[scale][-1]), partial(Row, reduced=scale != "paper")
    rows = []
    for setting, seeds in runs.items():
        finals = [run.final() for run in seeds]
        losses = tuple(_late(run, "train/loss") for run in seeds)
        accuracies = tuple(100 * _late(run, "train/accuracy") for run in seeds)
        rows += [
            Row(setting, "parameters", tuple(float(final["parameters"]) for final in finals)),
            make(setting, "training loss at the end", losses, setting == deepest),
            make(setting, "training accuracy % at the end", accuracies),
            make(setting, "test loss", tuple(final["eval/loss"] for final in finals)),
            make(setting, "test accuracy %", tuple(100 * f["eval/accuracy"] for f in finals)),
            make(setting, "mean |alpha| at the end", gates_at_end(seeds)),
        ]
    ends = (find(rows, name, "training loss at the end").draws for name in (deepest, CONTROL))
    judged = partial(bounded, reduced=scale != "paper")
    claims = [
        judged(
            "ReZero nets of up to 10,000 layers can be trained",
            "UAI 6",
            f"training loss of {deepest} minus that of the net with {CONTROL}",
            paired(*ends),
            high=0,
        ),
        judged(
            "ReZero nets of 10,000 layers overfit the training set",
            "UAI 6, footnote 2",
            f"training accuracy (%) of {deepest}, above {FITTED}",
            find(rows, deepest, "training accuracy % at the end").draws,
            low=FITTED,
        ),
    ]
    curves = {setting: training_curve(seeds) for setting, seeds in runs.items()}
    return Results("depth", scale, rows, claims, curves)


def plot(results: Results) -> Figure:
    """The smoothed loss by update of each depth, and the test loss at the end."""
    figure, (left, right) = drawing.sheet_of(results, panels=2)
    for setting, colour in drawing.colours(results.curves).items():
        drawing.line(left, drawing.smoothed(results.curves[setting]), setting, colour)
    drawing.target(left, CHANCE)
    left.set(xlabel="update", ylabel="training cross entropy (nats)")
    left.legend()
    ends = {row.setting: row.mean for row in results.rows if row.metric == "test loss"}
    drawing.levels(right, {CONTROL: held} if (held := ends.pop(CONTROL)) else {})
    depths = [int(setting.split()[0].replace(",", "")) for setting in ends]
    right.plot(depths, [end or np.nan for end in ends.values()], color=COLOURS[0], marker="o")
    drawing.size_axis(right, depths, "layers")
    right.set(ylabel="test cross entropy at the end (nats)")
    return figure
