"""Learning curves of one run, of several side by side, and when each reached a target."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rezero_jax.analysis.compare import by_label, times_to
from rezero_jax.analysis.plots.figures import draw_gates, plot_times
from rezero_jax.analysis.plots.theme import (
    COLOURS,
    legend,
    line_styles,
    plain_ticks,
    plot_line,
    save,
    themed,
)
from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run

# What a title tells of a comparison, where all of its runs agree.
FIELDS = {"data.name": "", "model.depth": "depth ", "model.width": "width "}


@themed
def plot_run(run: Run) -> Figure:
    """Loss and accuracy by epoch, and, if the network is gated, every alpha by layer.

    A language model has its bits per byte instead of both, and steps instead of epochs.
    """
    if _is_text(run):
        x, panels = "step", {"bits_per_byte": "bits per byte"}
    else:
        x, panels = "epoch", {"loss": "cross entropy (nats)", "accuracy": "accuracy"}
    alphas = run.alphas()[1]
    gated = alphas.shape[1] > 0
    figure = Figure(figsize=(3.5 * (len(panels) + gated), 3))
    axes = list(figure.subplots(1, len(panels) + gated, squeeze=False).flat)
    style = line_styles(2)
    for axis, (metric, title) in zip(axes, panels.items(), strict=False):
        batches = run.series(f"train/{metric}", x)
        axis.plot(*batches, color=COLOURS[0], alpha=0.35, lw=1, label="training batches")
        epochs, losses = run.series("train/epoch_loss", x)
        if metric == "loss" and len(epochs):  # a run may be shorter than an epoch
            plot_line(axis, epochs, losses, **style[0], label="training, epoch mean")
        plot_line(axis, *run.series(f"eval/{metric}", x), **style[1], label="evaluation")
        if metric == "loss":
            axis.set_yscale("log")
            plain_ticks(axis)
        axis.set(xlabel=x, title=title)
    if gated:
        draw_gates(axes[-1], np.array([line[x] for line in run.lines]), alphas, x)
    legend(figure, axes[0])
    name = ", ".join(f"{k}={run.config[f'model.{k}']}" for k in ("residual", "depth", "width"))
    figure.suptitle(f"{run.config['data.name']}: {name}")
    return figure


@themed
def plot_comparison(runs: Sequence[Run]) -> Figure:
    """One curve for each setting: the mean of its seeds, and their range.

    What all runs have is shown: of language models the bits per byte of their evaluations by step;
    of others the epoch loss; of both together, or of runs shorter than an epoch, the loss of the
    training batches by step.
    """
    figure = Figure(figsize=(5.5, 3.4))
    axis = figure.subplots()
    if all(_is_text(run) and len(run.series("eval/bits_per_byte")[0]) for run in runs):
        _compare_bits(axis, runs)
    elif all(len(run.epoch_losses()) for run in runs):
        _compare_losses(axis, runs, "train/epoch_loss", "epoch")
    else:
        _compare_losses(axis, runs, "train/loss", "step")
    axis.grid(True, which="both")
    legend(figure, axis)
    shared = [
        name + str(values.pop())
        for key, name in FIELDS.items()
        if len(values := {run.config.get(key) for run in runs}) == 1
    ]
    axis.set_title(", ".join(shared))
    return figure


def _is_text(run: Run) -> bool:
    return len(run.series("train/bits_per_byte")[0]) > 0


def _compare_bits(axis: Axes, runs: Sequence[Run]) -> None:
    curves = _draw(axis, runs, "eval/bits_per_byte", "step")
    axis.set(xlabel="step", ylabel="bits per byte, evaluation")
    # 8 is to know nothing; a run that exploded would squeeze all others into a line.
    values = np.concatenate(curves)
    axis.set_ylim(values.min() - 0.1, min(values.max() + 0.1, 8))


def _compare_losses(axis: Axes, runs: Sequence[Run], key: str, x: str) -> None:
    curves = _draw(axis, runs, key, x)
    what = "mean over the epoch" if x == "epoch" else "of batches"
    axis.set(xlabel=x, ylabel=f"training loss (nats), {what}", yscale="log")
    # A run that exploded at first would squeeze all others into a line; it comes in from above.
    losses = np.concatenate(curves)
    ceiling = min(1.3 * losses.max(), 5 * min(curve.max() for curve in curves))
    axis.set_ylim(losses.min() / 1.3, ceiling)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_ticks(axis)


def _draw(axis: Axes, runs: Sequence[Run], key: str, x: str) -> list[np.ndarray]:
    """A line for each setting: the mean of its seeds as far as all of them go, and their range.

    Returns:
      The values of each run.
    """
    settings = by_label(runs)
    for style, (name, seeds) in zip(line_styles(len(settings)), settings.items(), strict=True):
        series = [run.series(key, x) for run in seeds]
        shortest = min(len(steps) for steps, _ in series)
        steps, values = series[0][0][:shortest], np.stack([y[:shortest] for _, y in series])
        count = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
        plot_line(axis, steps, values.mean(0), **style, label=name + count)
        axis.fill_between(
            steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, lw=0
        )
    return [run.series(key)[1] for run in runs]


def write_plot(
    workdirs: Sequence[str | Path], out: str | Path | None = None, target: float | None = None
) -> Path:
    """Plots one run or several and returns the file.

    Args:
      workdirs: the runs' folders.
      out: the file, in the format of its ending; by default curves.png in the first workdir.
      target: shows when each setting reached it instead of the curves: a training loss (nats) or,
        where all runs are of language models, bits per byte.

    Raises:
      UserError: a workdir holds no run or one without a logged line, or the file is invalid.
    """
    runs = [Run.read(folder) for folder in workdirs]
    for run in runs:
        if not run.lines:
            raise UserError(f"the run in {run.folder} has logged nothing yet; plot it later")
    path = Path(out) if out else runs[0].folder / "curves.png"
    if target is not None:
        metric = "bits_per_byte" if all(map(_is_text, runs)) else "loss"
        what = "steps to bits per byte" if metric == "bits_per_byte" else "epochs to a loss"
        figure = plot_times(times_to(runs, metric, target), f"{what} of {target:g}")
    else:
        figure = plot_run(runs[0]) if len(runs) == 1 else plot_comparison(runs)
    return save(figure, path)
