"""The authors' fully connected notebook: ten epochs of 64 layers in four architectures."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments import drawing, spectra
from experiments.jobs import Job
from experiments.notebooks import lies_in, one_more_run
from experiments.published import curve, published
from experiments.ratios import between
from experiments.results import Curve, Results, Row
from rezero_jax.analysis.plots.theme import plain_ticks
from rezero_jax.runs.reader import Run

TITLE = "Fully connected networks, beside the authors' notebook"
SOURCE = "the authors' fully connected notebook"
SEEDS = 1
_SETTING = (
    "64 layers of width 256 on CIFAR-10, batches of 100, Adagrad 0.01, ten epochs. Bars hold 95 % "
    "of the runs to expect, by Student's prediction interval of the logarithm."
)
SETTING = {
    "paper": _SETTING,
    "cpu": _SETTING,
    "smoke": "Reduced: 4 layers of width 8 on scikit-learn's digits, 2 epochs.",
}
NOTES = (
    "The notebook has one run of each net and prints the mean training loss of each epoch. Its "
    "LayerNorm net shares one LayerNorm among all layers, ours has one in each. Singular values "
    "are those of the input-output Jacobian, of 30 normal inputs; the notebook has 100.",
)

RULES = {
    "Vanilla, 64 layers": "plain",
    "Residual, 64 layers": "residual",
    "LayerNorm, 64 layers": "norm",
    "ReZero, 64 layers": "rezero",
}
JUDGED = tuple(setting for setting, rule in RULES.items() if rule != "norm")
EPOCHS = range(1, 11)
SQUARES = "mean squared singular value at the end"


def runs(scale: str) -> list[Job]:
    """One of each architecture."""
    size = "smoke,epochs=2" if scale == "smoke" else "depth=64,dataset=cifar10"
    return [
        Job(setting, f"notebook-fc-{rule}", f"mlp.py:residual={rule},{size}")
        for setting, rule in RULES.items()
    ]


def measure(scale: str, runs: Mapping[str, Sequence[Run]]) -> Results:
    """The loss of each epoch, and whether the notebook's could be that of one more run of ours."""
    reduced = scale == "smoke"
    losses = {setting: [run.epoch_losses() for run in seeds] for setting, seeds in runs.items()}
    rows = []
    for setting, seeds in losses.items():
        for epoch in EPOCHS[:2] if reduced else EPOCHS:
            draws = tuple(float(loss[epoch - 1]) if epoch <= len(loss) else None for loss in seeds)
            last = epoch == EPOCHS[-1]
            quantity = f"loss of epoch {epoch}"
            rows.append(Row(setting, quantity, draws, last, reduced, "diverged", is_geometric=True))
        squares = tuple(None if run.diverged else _mean_square(run) for run in runs[setting])
        rows.append(Row(setting, SQUARES, squares, False, reduced, "diverged", is_geometric=True))
    curves = {setting: Curve.by_epoch(seeds) for setting, seeds in losses.items()}
    claims = [
        one_more_run(
            f"{setting}: the losses of the notebook's ten epochs",
            "notebook_fc",
            [row for row in rows if _is_loss(row, setting)],
            len(JUDGED) * len(EPOCHS),
            reduced,
        )
        for setting in JUDGED
    ]
    remarks = [_remark(row) for row in rows if row.quantity == SQUARES and not reduced]
    return Results("notebook_fc", scale, rows, claims, curves, remarks)


def _mean_square(run: Run) -> float:
    return float((spectra.after(run, run.final()["steps"]) ** 2).mean())


def _is_loss(row: Row, setting: str) -> bool:
    return row.setting == setting and row.quantity != SQUARES


def _remark(row: Row) -> str:
    """Where the notebook's mean squared singular value lies; it decides nothing."""
    if (interval := row.prediction()) is None:
        return f"{row.setting}, {SQUARES}: no interval."
    inside = lies_in(interval, published("notebook_fc")[row.setting, row.quantity])
    lies = "inside" if inside else "outside"
    return (
        f"{row.setting}, {SQUARES}: the notebook's lies {lies} of the interval for one more run of "
        f"ours, {between(interval)}."
    )


def plot(results: Results) -> Figure:
    """The losses by epoch with the intervals that decide; the notebook's as crosses."""
    figure, (axis,) = drawing.sheet(TITLE, results.scale, SETTING[results.scale])
    for setting, colour in drawing.colours(results.curves).items():
        drawing.line(axis, results.curves[setting]._replace(half=None), setting, colour)
        for row in results.rows:
            if _is_loss(row, setting) and (interval := row.prediction()):
                axis.plot([float(row.quantity.split()[-1])] * 2, interval, color=colour, lw=1)
        if results.scale != "smoke":
            drawing.crosses(axis, curve("notebook_fc", setting, "loss of epoch"), colour)
    axis.set(xlabel="epoch", ylabel="training cross entropy (nats)", yscale="log")
    lowest = min(y for drawn in results.curves.values() for y in drawn.y)
    axis.set_ylim(lowest / 1.2, 4)  # what exploded comes in from above
    plain_ticks(axis)
    title = "lines ours, crosses the notebook's" if results.scale != "smoke" else None
    axis.legend(
        title=title, fontsize=7, title_fontsize=7, loc="upper right", bbox_to_anchor=(1, 0.64)
    )
    return figure
