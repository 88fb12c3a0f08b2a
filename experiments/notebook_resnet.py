"""The authors' ResNet notebook: the accuracy after its first epochs, with ReZero and without."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments import drawing
from experiments.claims import bounded, paired
from experiments.jobs import Job
from experiments.notebooks import one_more_run
from experiments.ratios import quotients
from experiments.results import Results, Row, find
from rezero_jax.runs.reader import Run

TITLE = "ResNets, beside the authors' notebook"
SOURCE = "the authors' ResNet notebook"
SEEDS = 1
SETTING = {
    "paper": "ResNet-20 at a rate of 0.2, ResNet-56 and 110 at 0.1, CIFAR-10, batches of 128, as "
    "many epochs as in the notebook. Bars hold 95 % of the runs to expect, by Student's "
    "prediction interval.",
    "cpu": "ResNet-20 at a rate of 0.2 and ResNet-56 at 0.1 on CIFAR-10, batches of 128, an epoch "
    "as in the notebook. Bars hold 95 % of the runs to expect, by Student's prediction interval.",
    "smoke": "Reduced: 8 layers of width 4 on scikit-learn's digits, an epoch.",
}
NOTES = ("The notebook has one run of each net and prints the test accuracy after each epoch.",)

DEPTHS = {"paper": (20, 56, 110), "cpu": (20, 56), "smoke": (20,)}
RATES = {20: 0.2, 56: 0.1, 110: 0.1}  # of learning, by depth
EPOCHS = {20: 2, 56: 4, 110: 8}  # of the vanilla nets
VANILLA, OURS = "ResNet-20", "ResNet-20 + ReZero"
DEEPEST, FEWER = "ResNet-110", '"up to" times fewer epochs to 50 %'


def runs(scale: str) -> list[Job]:
    """One of each net with ReZero and without."""
    jobs = []
    for depth in DEPTHS[scale]:
        for scheme, rule in {"": "residual", " + ReZero": "rezero"}.items():
            epochs = EPOCHS[depth] if scale == "paper" and not scheme else 1
            size = "smoke" if scale == "smoke" else f"depth={depth},lr={RATES[depth]}"
            config = f"resnet.py:residual={rule},recipe=notebook,{size},epochs={epochs}"
            jobs.append(Job(f"ResNet-{depth}{scheme}", f"notebook-resnet{depth}-{rule}", config))
    return jobs


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The accuracies, whether ReZero is ahead, and whether the notebook's could be ours."""
    reduced = scale == "smoke"
    rows = []
    for setting, seeds in runs.items():
        found = [run.evaluations("eval/accuracy") for run in seeds]
        for epoch in range(1, int(seeds[0].config["train.epochs"]) + 1):
            draws = tuple(100 * one[epoch] if epoch in one else None for one in found)
            quantity = f"accuracy % after epoch {epoch}"
            rows.append(Row(setting, quantity, draws, epoch == 1, reduced, "diverged"))
        size = tuple(run.final()["parameters"] / 1e6 for run in seeds)
        rows.append(Row(setting, "million parameters", size, reduced=reduced))
    if scale == "paper":
        to_half = {s: [run.time_to("accuracy", 0.5) for run in seeds] for s, seeds in runs.items()}
        fewer = quotients(to_half[DEEPEST], to_half[f"{DEEPEST} + ReZero"])
        rows.append(Row(f"{DEEPEST} + ReZero", FEWER, fewer, is_geometric=True))
    ours, theirs = (find(rows, name, "accuracy % after epoch 1").ours for name in (OURS, VANILLA))
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
    printed = [row for row in rows if row.quantity.startswith("accuracy")]
    for setting in runs:
        of = [row for row in printed if row.setting == setting]
        text = f"{setting}: the accuracy of the notebook's first epochs"
        claims.append(one_more_run(text, "notebook_resnet", of, len(printed), reduced))
    return Results("notebook_resnet", scale, rows, claims)


def plot(results: Results) -> Figure:
    """Each run's accuracy as a dot, the interval for one more, and the notebook's as a cross."""
    figure, (axis,) = drawing.sheet(TITLE, results.scale, SETTING[results.scale])
    rows = [row for row in results.rows[::-1] if row.quantity.startswith("accuracy")]
    for height, row in enumerate(rows):
        known = [draw for draw in row.ours if draw is not None]
        axis.plot(known, [height] * len(known), "o", color="#0072B2", markersize=4)
        if interval := row.prediction():
            axis.plot(interval, [height] * 2, color="#0072B2", lw=1)
        if (paper := results.paper(row)) and paper.value is not None:
            axis.plot(paper.value, height, "x", color="#D55E00", markersize=7)
    labels = [f"{row.setting}, epoch {row.quantity.split()[-1]}" for row in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.set(
        xlabel="test accuracy (%); dots ours, crosses the notebook's", ylim=(-0.5, len(rows) - 0.5)
    )
    return figure
