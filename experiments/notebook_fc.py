"""The authors' fully connected notebook: ten epochs of 64 layers in four architectures."""

from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from experiments import drawing, spectra
from experiments.claims import lies_in, one_more_run
from experiments.jobs import Job
from experiments.published import curve, published
from experiments.results import Curve, Results, Row
from experiments.statistics import between
from rezero_jax.analysis.theme import plain_ticks
from rezero_jax.runs.reader import Run

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
    """The loss of each epoch, and whether the notebook's could be those of one more run of ours."""
    make = partial(Row, reduced=scale == "smoke", log=True)
    losses = {setting: [run.epoch_losses() for run in seeds] for setting, seeds in runs.items()}
    rows = []
    for setting, seeds in losses.items():
        for epoch in EPOCHS[:2] if scale == "smoke" else EPOCHS:
            draws = tuple(float(loss[epoch - 1]) if epoch <= len(loss) else None for loss in seeds)
            rows.append(make(setting, f"loss of epoch {epoch}", draws, epoch == EPOCHS[-1]))
        squares = tuple(
            None if run.diverged else float((spectra.after(run, run.final()["steps"]) ** 2).mean())
            for run in runs[setting]
        )
        rows.append(make(setting, SQUARES, squares))
    curves = {setting: Curve.by_epoch(seeds) for setting, seeds in losses.items()}
    claims = [
        one_more_run(
            f"{setting}: the losses of the notebook's ten epochs",
            "notebook_fc",
            [row for row in rows if _is_loss(row, setting)],
            len(JUDGED) * len(EPOCHS),
            reduced=scale == "smoke",
        )
        for setting in JUDGED
    ]
    return Results("notebook_fc", scale, rows, claims, curves, secondary(rows))


def secondary(rows: Sequence[Row]) -> list[str]:
    """Where the notebook's mean squared singular values lie."""
    sentences = []
    for row in rows:
        if row.metric == SQUARES and (interval := row.prediction()):
            inside = lies_in(interval, published("notebook_fc")[row.setting, row.metric])
            sentences.append(
                f"{row.setting}, {SQUARES}: the notebook's lies {'in' if inside else 'out'}side "
                f"our 95 % prediction interval, {between(interval)}."
            )
    return sentences


def _is_loss(row: Row, setting: str) -> bool:
    return row.setting == setting and row.metric != SQUARES


def plot(results: Results) -> Figure:
    """The losses by epoch with prediction intervals; crosses show the notebook's."""
    figure, (axis,) = drawing.sheet_of(results)
    for setting, colour in drawing.colours(results.curves).items():
        drawing.line(axis, results.curves[setting]._replace(half=None), setting, colour)
        for row in results.rows:
            if _is_loss(row, setting) and (interval := row.prediction()):
                axis.plot([float(row.metric.split()[-1])] * 2, interval, color=colour, lw=1)
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
