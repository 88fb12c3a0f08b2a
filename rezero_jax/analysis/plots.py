"""Plots of runs: `python -m rezero_jax.analysis.plots WORKDIR [WORKDIR ...] [--target=VALUE]`.

For one workdir, plots learning curves, and gates by layer and step. For several, plots epoch losses
(language models: evaluations by step), as the mean and range over seeds.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rezero_jax import command
from rezero_jax.analysis.figures import draw_by_layer, draw_gates, plot_times
from rezero_jax.analysis.table import by_label
from rezero_jax.analysis.theme import (
    COLOURS,
    legend,
    line_styles,
    plain_ticks,
    plot_line,
    save,
    themed,
)
from rezero_jax.errors import UserError, foreign
from rezero_jax.runs.files import AnyPath
from rezero_jax.runs.reader import Run

# Metrics of `rezero_jax.analysis.diagnosis.by_layer`, and their titles.
BY_LAYER = {"signal": "|x|", "gradient": "|dL/dx|", "weight_gradient": "|dL/dw|"}
# Fields that the title of a comparison shows if all runs agree on them.
FIELDS = {"data.name": "", "model.depth": "depth ", "model.width": "width "}


@themed
def plot_run(run: Run) -> Figure:
    """Loss and accuracy by epoch (language models: bits per byte by step), and every alpha."""
    if _is_text(run):
        x, panels = "step", {"bits_per_byte": "bits per byte"}
    else:
        x, panels = "epoch", {"loss": "cross entropy (nats)", "accuracy": "accuracy"}
    xs, alphas = run.alphas(x)
    gated = alphas.size > 0
    measured = {
        name: text for name, text in BY_LAYER.items() if f"metric/{name}/0" in run.lines[-1]
    }
    count = len(panels) + gated + len(measured)
    figure = Figure(figsize=(3.5 * min(count, 3), 3 * -(-count // 3)))
    axes = [figure.add_subplot(-(-count // 3), min(count, 3), i + 1) for i in range(count)]
    style = line_styles(2)
    for axis, (metric, title) in zip(axes, panels.items(), strict=False):
        batches = run.series(f"train/{metric}", x)
        faint: dict[str, Any] = {"color": COLOURS[0], "alpha": 0.35, "lw": 1}
        point = "o" if len(batches[0]) == 1 else None  # a line of one point is invisible
        axis.plot(*batches, **faint, marker=point, label="training batches")
        epochs, losses = run.series("train/epoch_loss", x)
        if metric == "loss" and len(epochs):  # a run may be shorter than an epoch
            plot_line(axis, epochs, losses, **style[0], label="training, epoch mean")
        plot_line(axis, *run.series(f"eval/{metric}", x), **style[1], label="evaluation")
        if metric == "loss":
            axis.set_yscale("log")
            plain_ticks(axis)
        axis.set(xlabel=x, title=title)
    if gated:
        draw_gates(axes[len(panels)], xs, alphas, x)
    for axis, (name, title) in zip(axes[len(panels) + gated :], measured.items(), strict=True):
        layers = sum(key.startswith(f"metric/{name}/") for key in run.lines[-1])
        series = [run.series(f"metric/{name}/{layer}", x) for layer in range(layers)]
        values = np.array([values for _, values in series])
        logs = np.log10(np.where(values > 0, values, np.nan))
        title = f"log10 of {title}" + " (blank: 0)" * bool((values == 0).any())
        label = "layer, from 0" if name == "weight_gradient" else "layers passed"
        draw_by_layer(axis, series[0][0], logs, x, title, label)
    legend(figure, axes[0])
    name = ", ".join(f"{k}={run.config.get(f'model.{k}')}" for k in ("residual", "depth", "width"))
    figure.suptitle(f"{run.config.get('data.name')}: {name}")
    return figure


@themed
def plot_comparison(runs: Sequence[Run]) -> Figure:
    """One curve per setting: mean and range over its seeds, up to the end of the shortest run.

    Language models are compared by their evaluations' bits per byte, other runs by their epoch
    losses. If a run has fewer than two of these, all runs are compared by training batches.
    """

    def have(key: str) -> bool:
        return all(len(run.series(key)[0]) > 1 for run in runs)

    if have("eval/bits_per_byte"):
        key, x, ylabel = "eval/bits_per_byte", "step", "bits per byte, evaluation"
    elif have("train/epoch_loss"):
        key, x, ylabel = "train/epoch_loss", "epoch", "training loss (nats), mean over the epoch"
    else:
        key, x, ylabel = "train/loss", "step", "training loss (nats), of batches"
    figure = Figure(figsize=(5.5, 3.4))
    axis = figure.subplots()
    settings = by_label(runs)
    for style, (name, seeds) in zip(line_styles(len(settings)), settings.items(), strict=True):
        series = [run.series(key, x) for run in seeds]
        shortest = min(len(steps) for steps, _ in series)
        steps, values = series[0][0][:shortest], np.stack([y[:shortest] for _, y in series])
        count = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
        plot_line(axis, steps, values.mean(0), **style, label=name + count)
        colour = style["color"]
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
    axis.set(xlabel=x, ylabel=ylabel)
    # A run that diverges may leave the panel, so that the other curves stay legible.
    curves = [run.series(key)[1] for run in runs]
    low, high = min(curve.min() for curve in curves), max(curve.max() for curve in curves)
    if key == "eval/bits_per_byte":
        axis.set_ylim(low - 0.1, min(high + 0.1, 8))  # 8 is uniform guessing
    else:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.3, min(1.3 * high, 5 * min(curve.max() for curve in curves)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        plain_ticks(axis)
    axis.grid(True, which="both")
    legend(figure, axis)
    shared = [
        f"{name}{runs[0].config.get(key)}"
        for key, name in FIELDS.items()
        if len({run.config.get(key) for run in runs}) == 1
    ]
    axis.set_title(", ".join(shared))
    return figure


def _is_text(run: Run) -> bool:
    return len(run.series("train/bits_per_byte")[0]) > 0


def write_plot(
    workdirs: Sequence[AnyPath], out: AnyPath | None = None, target: float | None = None
) -> epath.Path:
    """Plots one run or several, and returns the path of the file.

    `out` is a PNG, SVG or PDF file, by default curves.png in the first workdir. With a `target`,
    training loss (nats), or bits per byte if all runs are language models, plots the time to it
    instead of curves. Raises a UserError for a workdir without logged lines or an unwritable file.
    """
    runs = Run.read_all(workdirs)
    with foreign(", ".join(str(run.folder) for run in runs)):
        for run in runs:
            if not run.lines:
                raise UserError(f"the run in {run.folder} has logged nothing yet; plot it later")
        if target is not None:
            text = all(map(_is_text, runs))
            metric = "bits_per_byte" if text else "loss"
            what = "steps to bits per byte" if text else "epochs to a loss"
            times = {
                label: [run.time_to(metric, target) for run in seeds]
                for label, seeds in by_label(runs).items()
            }
            figure = plot_times(times, f"{what} of {target:g}")
        else:
            figure = plot_run(runs[0]) if len(runs) == 1 else plot_comparison(runs)
        return save(figure, out or runs[0].folder / "curves.png")


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m rezero_jax.analysis.plots", __doc__)
    parser.add_argument(
        "workdirs", type=command.path, nargs="+", metavar="WORKDIR", help="folders of runs"
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="VALUE",
        help="training loss, or bits per byte of language models: plot the time to this target, "
        "with 95 %% intervals over seeds (default: plot curves)",
    )
    text = "picture, a PNG, SVG or PDF file (default: curves.png in the first workdir)"
    parser.add_argument("--out", type=command.path, metavar="FILE", help=text)
    args = parser.parse_args(argv)
    return command.exit_status(
        "plots", lambda: print(f"wrote {write_plot(args.workdirs, args.out, args.target)}")
    )


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
