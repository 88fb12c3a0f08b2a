"""The authors' ResNet notebook: the accuracy after its first epochs, with ReZero and without."""

from matplotlib.figure import Figure

from experiments import drawing
from experiments.results import Results, Runs, times_to
from experiments.statistics import quotients
from rezero_jax.analysis.theme import COLOURS

DEEPEST = "ResNet-110"
ACCURACY = "accuracy % after epoch"


def measure(results: Results, runs: Runs) -> None:
    """The accuracies, whether ReZero is ahead, and whether the notebook's could be ours."""
    for setting, seeds in runs.items():
        found = [run.evaluations("eval/accuracy") for run in seeds]
        for epoch in range(1, int(seeds[0].config["train.epochs"]) + 1):
            draws = (100 * one[epoch] if epoch in one else None for one in found)
            results.add(setting, f"{ACCURACY} {epoch}", draws)
        sizes = (run.final()["parameters"] / 1e6 for run in seeds)
        results.add(setting, "million parameters", sizes)
    if results.scale == "paper":
        name = f"{DEEPEST} + ReZero"
        to_half = [times_to(runs[net], "accuracy", 0.5) for net in (DEEPEST, name)]
        results.add(name, '"up to" times fewer epochs to 50 %', quotients(*to_half), log=True)
    text = "ResNet-20 with ReZero is ahead of the vanilla net after an epoch, as in the notebook"
    ahead = results.differences(f"{ACCURACY} 1", "ResNet-20 + ReZero", "ResNet-20")
    results.bounded(text, "NB-RN", "points that ReZero is ahead", ahead, low=0)
    printed = [row for row in results.rows if row.metric.startswith("accuracy")]
    for setting in runs:
        text = f"{setting}: the accuracy of the notebook's first epochs"
        results.one_more_run(text, [row for row in printed if row.setting == setting], len(printed))


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
    axis.set(xlabel="test accuracy (%); dots ours, crosses the notebook's")
    axis.set_ylim(-0.5, len(rows) - 0.5)
    return figure
