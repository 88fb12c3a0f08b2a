"""Learning curves of one run, of several side by side, and when each reached a target."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rezero_jax.analysis.compare import by_label, times_to
from rezero_jax.analysis.plots.figures import draw_gates, plot_times
from rezero_jax.analysis.plots.theme import (
    COLOURS,
    draw_curve,
    legend,
    looks,
    plain_ticks,
    save,
    styled,
)
from rezero_jax.runs.reader import Run


@styled
def plot_run(run: Run) -> Figure:
    """Loss and accuracy by epoch, and, if the network is gated, every alpha by layer and step.

    Of a language model the bits per byte stand in place of the accuracy.
    """
    steps, alphas = run.alphas()
    gated = alphas.shape[1] > 0
    figure = Figure(figsize=(10.5 if gated else 7, 3))
    axes = figure.subplots(1, 3 if gated else 2)
    text = _is_text(run)
    second = ("bits_per_byte", "bits per byte") if text else ("accuracy", "accuracy")
    panels = (("loss", "cross entropy (nats)"), second)
    for axis, (metric, title) in zip(axes, panels, strict=False):
        axis.plot(*run.series(f"train/{metric}", "epoch"), color=COLOURS[0], alpha=0.35, lw=1)
        if metric == "loss":
            epochs, losses = run.series("train/epoch_loss", "epoch")
            if len(epochs):  # a run may be shorter than an epoch
                draw_curve(axis, epochs, losses, **looks(1)[0], label="training, epoch mean")
            axis.set_yscale("log")
        evaluations = run.series(f"eval/{metric}", "epoch")
        draw_curve(axis, *evaluations, **looks(2)[1], label="evaluation")
        if metric == "loss":
            plain_ticks(axis)
        axis.set(xlabel="epoch", title=title)
    axes[0].legend()
    corner = "upper right" if text else "lower right"
    axes[1].legend(["training batches", "evaluation"], loc=corner)
    if gated:
        draw_gates(axes[2], steps, alphas)
    name = ", ".join(f"{k}={run.config[f'model.{k}']}" for k in ("residual", "depth", "width"))
    figure.suptitle(f"{run.config['data.name']}: {name}")
    return figure


@styled
def plot_comparison(runs: Sequence[Run]) -> Figure:
    """Epoch loss of several runs on a log axis; the seeds of one setting as mean and range.

    Of language models the bits per byte of their evaluations by step.
    """
    figure = Figure(figsize=(5.5, 3.6))
    axis = figure.subplots()
    if all(map(_is_text, runs)):
        _compare_bits(axis, runs)
    else:
        _compare_losses(axis, runs)
    axis.grid(True, which="both")
    legend(figure, axis)
    config = runs[0].config
    axis.set_title(
        f"{config['data.name']}, depth {config['model.depth']}, width {config['model.width']}"
    )
    return figure


def _is_text(run: Run) -> bool:
    return len(run.series("train/bits_per_byte")[0]) > 0


def _compare_bits(axis: Axes, runs: Sequence[Run]) -> None:
    _draw(axis, runs, lambda run: run.series("eval/bits_per_byte"))
    axis.set(xlabel="step", ylabel="bits per byte, evaluation")
    # 8 is to know nothing; a run that exploded would squeeze all others into a line.
    values = np.concatenate([run.series("eval/bits_per_byte")[1] for run in runs])
    axis.set_ylim(values.min() - 0.1, min(values.max() + 0.1, 8))


def _compare_losses(axis: Axes, runs: Sequence[Run]) -> None:
    _draw(axis, runs, lambda run: (np.arange(1, len(run.epoch_losses()) + 1), run.epoch_losses()))
    axis.set(xlabel="epoch", ylabel="training loss (nats), mean over the epoch", yscale="log")
    # A run that exploded at first would squeeze all others into a line; it comes in from above.
    losses = np.concatenate([run.epoch_losses() for run in runs])
    ceiling = min(1.3 * losses.max(), 5 * min(run.epoch_losses().max() for run in runs))
    axis.set_ylim(losses.min() / 1.3, ceiling)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_ticks(axis)


def _draw(
    axis: Axes, runs: Sequence[Run], curve: Callable[[Run], tuple[np.ndarray, np.ndarray]]
) -> None:
    """A line for each setting: the mean of its seeds as far as all of them go, and their range."""
    groups = by_label(runs)
    for look, (name, group) in zip(looks(len(groups)), groups.items(), strict=True):
        curves = [curve(run) for run in group]
        shortest = min(len(x) for x, _ in curves)
        x, values = curves[0][0][:shortest], np.stack([y[:shortest] for _, y in curves])
        seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
        draw_curve(axis, x, values.mean(0), **look, label=name + seeds)
        axis.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.2, lw=0)


def write_plot(
    workdirs: Sequence[str | Path], out: str | Path | None = None, target: float | None = None
) -> Path:
    """Plots one run or several and returns the file.

    Args:
      workdirs: the runs' folders.
      out: the file, in the format of its ending; by default curves.png in the first workdir.
      target: shows when each setting reached it in place of the curves: a training loss (nats) or,
        where all runs are of language models, bits per byte.

    Raises:
      UserError: a workdir holds no run, or the file cannot be.
    """
    runs = [Run.read(folder) for folder in workdirs]
    path = Path(out) if out else runs[0].folder / "curves.png"
    if target is not None:
        metric = "bits_per_byte" if all(map(_is_text, runs)) else "loss"
        what = "steps to bits per byte" if metric == "bits_per_byte" else "epochs to a loss"
        figure = plot_times(times_to(runs, metric, target), f"{what} of {target:g}")
    else:
        figure = plot_run(runs[0]) if len(runs) == 1 else plot_comparison(runs)
    return save(figure, path)
