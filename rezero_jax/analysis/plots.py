"""Plots of runs: `python -m rezero_jax.analysis.plots WORKDIR [WORKDIR ...] [--out=FILE]`.

One workdir gives its learning curves and its gates by layer and step; several give their epoch
losses in one panel, or of language models the evaluations by step, runs that differ in the seed
alone as their mean and range.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rezero_jax.analysis.runs import Run, by_label
from rezero_jax.errors import UserError

# Okabe and Ito's colours, told apart in every common colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_run(run: Run) -> Figure:
    """Loss and accuracy by epoch, and, if the network is gated, every alpha by layer and step.

    Of a language model the bits per byte stand in place of the accuracy.
    """
    steps, alphas = run.alphas()
    gated = alphas.shape[1] > 0
    figure, axes = plt.subplots(1, 3 if gated else 2, figsize=(13 if gated else 9, 3.8))
    text = _is_text(run)
    second = ("bits_per_byte", "bits per byte") if text else ("accuracy", "accuracy")
    panels = (("loss", "cross entropy (nats)"), second)
    for axis, (metric, title) in zip(axes, panels, strict=False):
        axis.plot(*run.series(f"train/{metric}", "epoch"), color=COLOURS[0], alpha=0.35, lw=1)
        if metric == "loss":
            epochs, losses = run.series("train/epoch_loss", "epoch")
            if len(epochs):  # a run may be shorter than an epoch
                axis.plot(
                    epochs, losses, color=COLOURS[0], marker=".", label="training, epoch mean"
                )
            axis.set_yscale("log")
        axis.plot(
            *run.series(f"eval/{metric}", "epoch"), color=COLOURS[1], marker=".", label="evaluation"
        )
        if metric == "loss":
            _plain_ticks(axis)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    corner = "upper right" if text else "lower right"
    axes[1].legend(["training batches", "evaluation"], frameon=False, loc=corner)
    if gated:
        bound = max(np.abs(alphas).max(), 1e-12)
        mesh = axes[2].pcolormesh(
            steps, np.arange(alphas.shape[1]), alphas.T, cmap="PuOr", vmin=-bound, vmax=bound
        )
        figure.colorbar(mesh, ax=axes[2])
        axes[2].set(xlabel="step", ylabel="layer", title="alpha")
        axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    name = ", ".join(f"{k}={run.config[f'model.{k}']}" for k in ("residual", "depth", "width"))
    figure.suptitle(f"{run.config['data.name']}: {name}")
    figure.tight_layout()
    return figure


def plot_comparison(runs: Sequence[Run]) -> Figure:
    """Epoch loss of several runs on a log axis; the seeds of one setting as mean and range.

    Of language models the bits per byte of their evaluations by step.
    """
    figure, axis = plt.subplots(figsize=(7, 4.5))
    if all(map(_is_text, runs)):
        _compare_bits(axis, runs)
    else:
        _compare_losses(axis, runs)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    config = runs[0].config
    axis.set_title(
        f"{config['data.name']}, depth {config['model.depth']}, width {config['model.width']}"
    )
    figure.tight_layout()
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
    _plain_ticks(axis)


def _draw(
    axis: Axes, runs: Sequence[Run], curve: Callable[[Run], tuple[np.ndarray, np.ndarray]]
) -> None:
    """A line for each setting: the mean of its seeds as far as all of them go, and their range."""
    for colour, (name, group) in zip(cycle(COLOURS), by_label(runs).items(), strict=False):
        curves = [curve(run) for run in group]
        shortest = min(len(x) for x, _ in curves)
        x, values = curves[0][0][:shortest], np.stack([y[:shortest] for _, y in curves])
        seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
        axis.plot(x, values.mean(0), color=colour, marker=".", label=name + seeds)
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.25, lw=0)


def _plain_ticks(axis: Axes) -> None:
    """Writes 0.2, not 2e-01, at the ticks of a log axis, as many as have room."""
    low, high = axis.get_ylim()
    labelled = "12346" if high / low < 500 else "1"

    def text(value: float, position: float) -> str:
        return f"{value:g}" if f"{value:e}"[0] in labelled else ""

    axis.yaxis.set_major_formatter(text)
    axis.yaxis.set_minor_formatter(text)


def write_plot(workdirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Plots one run or several and returns the file, by default curves.png in the first workdir.

    Raises:
      UserError: a workdir holds no run.
    """
    runs = [Run.read(folder) for folder in workdirs]
    path = Path(out) if out else runs[0].folder / "curves.png"
    figure = plot_run(runs[0]) if len(runs) == 1 else plot_comparison(runs)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--out", metavar="FILE", help="default: curves.png in the first workdir")
    args = parser.parse_args(argv)
    try:
        print(f"wrote {write_plot(args.workdirs, args.out)}")
    except UserError as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
