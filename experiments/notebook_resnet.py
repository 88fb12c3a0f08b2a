"""The authors' ResNet notebook: the accuracy after its first epochs, with ReZero and without."""

from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import bounded, one_more_run
from experiments.jobs import Job
from experiments.results import Results, Row, find, times_to
from experiments.statistics import paired, quotients
from rezero_jax.analysis.theme import COLOURS
from rezero_jax.runs.reader import Run

DEPTHS = {"paper": (20, 56, 110), "cpu": (20, 56), "smoke": (20,)}
RATES = {20: 0.2, 56: 0.1, 110: 0.1}  # of learning, by depth
EPOCHS = {20: 2, 56: 4, 110: 8}  # of the vanilla nets
VANILLA, OURS = "ResNet-20", "ResNet-20 + ReZero"
DEEPEST, FEWER = "ResNet-110", '"up to" times fewer epochs to 50 %'


def runs(scale: str) -> list[Job]:
    """One of each net with ReZero and without."""
    jobs = []
    for depth in DEPTHS[scale]:
        for suffix, rule in {"": "residual", " + ReZero": "rezero"}.items():
            epochs = EPOCHS[depth] if scale == "paper" and not suffix else 1
            size = "smoke" if scale == "smoke" else f"depth={depth},lr={RATES[depth]}"
            config = f"resnet.py:residual={rule},recipe=notebook,{size},epochs={epochs}"
            jobs.append(Job(f"ResNet-{depth}{suffix}", f"notebook-resnet{depth}-{rule}", config))
    return jobs


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The accuracies, whether ReZero is ahead, and whether the notebook's could be ours."""
    reduced = scale == "smoke"
    make = partial(Row, reduced=reduced)
    rows = []
    for setting, seeds in runs.items():
        found = [run.evaluations("eval/accuracy") for run in seeds]
        for epoch in range(1, int(seeds[0].config["train.epochs"]) + 1):
            draws = tuple(100 * one[epoch] if epoch in one else None for one in found)
            rows.append(make(setting, f"accuracy % after epoch {epoch}", draws, epoch == 1))
        size = tuple(run.final()["parameters"] / 1e6 for run in seeds)
        rows.append(make(setting, "million parameters", size))
    if scale == "paper":
        name = f"{DEEPEST} + ReZero"
        to_half = [times_to(runs[net], "accuracy", 0.5) for net in (DEEPEST, name)]
        rows.append(make(name, FEWER, quotients(*to_half), log=True))
    ours, theirs = (find(rows, name, "accuracy % after epoch 1").draws for name in (OURS, VANILLA))
    claims = [
        bounded(
            "ResNet-20 with ReZero is ahead of the vanilla net after an epoch, as in the notebook",
            "NB-RN",
            "points that ReZero is ahead",
            paired(ours, theirs),
            low=0,
            reduced=reduced,
        )
    ]
    printed = [row for row in rows if row.metric.startswith("accuracy")]
    for setting in runs:
        of = [row for row in printed if row.setting == setting]
        text = f"{setting}: the accuracy of the notebook's first epochs"
        claims.append(one_more_run(text, "notebook_resnet", of, len(printed), reduced=reduced))
    return Results("notebook_resnet", scale, rows, claims)


def plot(results: Results) -> Figure:
    """Each run's accuracy as a dot, the prediction interval, and the notebook's as a cross."""
    figure, (axis,) = drawing.sheet_of(results)
    rows = [row for row in results.rows[::-1] if row.metric.startswith("accuracy")]
    for height, row in enumerate(rows):
        known = [draw for draw in row.draws if draw is not None]
        axis.plot(known, [height] * len(known), "o", color=COLOURS[0], markersize=4)
        if interval := row.prediction():
            axis.plot(interval, [height] * 2, color=COLOURS[0], lw=1)
        if (paper := results.paper(row)) and paper.value is not None:
            axis.plot(paper.value, height, "x", color=COLOURS[1], markersize=7)
    labels = [f"{row.setting}, epoch {row.metric.split()[-1]}" for row in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.set(
        xlabel="test accuracy (%); dots ours, crosses the notebook's", ylim=(-0.5, len(rows) - 0.5)
    )
    return figure
