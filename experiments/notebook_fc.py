"""The authors' fully connected notebook: ten epochs of 64 layers in four architectures."""

from matplotlib.figure import Figure

from experiments import drawing, spectra
from experiments.published import curve, lies_in, published
from experiments.results import Curve, Results, Row, Runs
from experiments.statistics import between

OTHER = "LayerNorm, 64 layers"  # shares one LayerNorm in the notebook, so no claim is on it
EPOCHS = range(1, 11)
SQUARES = "mean squared singular value at the end"


def measure(results: Results, runs: Runs) -> None:
    """The loss of each epoch, and whether the notebook's could be those of one more run of ours."""
    theirs = published("notebook_fc")
    for setting, seeds in runs.items():
        losses = [run.epoch_losses() for run in seeds]
        for epoch in EPOCHS[:2] if results.scale == "smoke" else EPOCHS:
            draws = (float(loss[epoch - 1]) if epoch <= len(loss) else None for loss in losses)
            results.add(setting, f"loss of epoch {epoch}", draws, log=True)
        squares = (
            None if run.diverged else float((spectra.after(run, run.final()["steps"]) ** 2).mean())
            for run in seeds
        )
        results.add(setting, SQUARES, squares, log=True)
        if interval := (row := results.rows[-1]).prediction():
            inside = lies_in(interval, theirs[setting, row.metric])
            results.remarks.append(
                f"{setting}, {SQUARES}: the notebook's lies {'in' if inside else 'out'}side "
                f"our 95 % prediction interval, {between(interval)}."
            )
        results.curves[setting] = Curve.by_epoch(losses)
    judged = [setting for setting in runs if setting != OTHER]
    for setting in judged:
        text = f"{setting}: the losses of the notebook's ten epochs"
        rows = [row for row in results.rows if _is_loss(row, setting)]
        results.one_more_run(text, rows, len(judged) * len(EPOCHS))


def _is_loss(row: Row, setting: str) -> bool:
    return row.setting == setting and row.metric != SQUARES


def plot(results: Results) -> Figure:
    """The losses by epoch with prediction intervals; crosses show the notebook's."""
    figure, (axis,) = drawing.sheet_of(results)
    drawing.epoch_losses(axis, results)
    for setting, colour in drawing.colours(results.curves).items():
        for row in results.rows:
            if _is_loss(row, setting) and (interval := row.prediction()):
                axis.plot([float(row.metric.split()[-1])] * 2, interval, color=colour, lw=1)
        if results.scale != "smoke":
            drawing.crosses(axis, curve("notebook_fc", setting, "loss of epoch"), colour)
    title = "lines ours,\ncrosses the notebook's" if results.scale != "smoke" else None
    drawing.legend(axis, title)
    return figure
