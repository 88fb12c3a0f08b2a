"""A Markdown table that compares runs: `python -m rezero_jax.analysis.table WORKDIR [WORKDIR ...]`.

Shows the mean training loss of chosen epochs and the epochs until chosen losses are reached. With
--accuracy it shows test accuracy instead, and with --bits_per_byte a language model's bits per byte
by step. A row is a setting: the mean and the range over the runs that differ only in the seed.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rezero_jax.analysis import command
from rezero_jax.analysis.compare import by_label, times_to
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import markdown_table, number
from rezero_jax.runs.reader import Run


class _Metric(NamedTuple):
    """How the table shows a metric of `Run.time_to`.

    Attributes:
      values: of a run by epoch or step.
      after: heads the column of the values after an epoch or step.
      until: heads the column of the times to a target.
      digits: of these times, after the point.
    """

    values: Callable[[Run], Mapping[Any, float]]
    after: str
    until: str
    digits: int = 0


METRICS = {
    "loss": _Metric(
        lambda run: dict(enumerate(run.epoch_losses(), 1)), "epoch {}", "epochs to {}", digits=2
    ),
    "accuracy": _Metric(
        lambda run: {epoch: 100 * a for epoch, a in run.evaluations("eval/accuracy").items()},
        "epoch {}",
        "first at {:.0%}",
    ),
    "bits_per_byte": _Metric(
        lambda run: dict(zip(*run.series("eval/bits_per_byte"), strict=True)),
        "step {:,}",
        "steps to {}",
    ),
}


def table(
    runs: Sequence[Run],
    after: Sequence[int],
    targets: Sequence[float],
    confidence: float | None = None,
    metric: str = "loss",
) -> str:
    """The Markdown table: the values after some epochs or steps, then the times to some targets.

    Args:
      runs: the runs.
      after: epochs, or steps for bits per byte.
      targets: values of the metric; the columns show `Run.time_to` of each.
      confidence: of the intervals shown beside the means of several seeds, such as 0.95 (see
        `Estimate.interval`); None shows their range.
      metric: "loss", the mean training loss (nats) of an epoch; "accuracy", of the evaluation after
        an epoch, in percent, with targets as fractions; "bits_per_byte", of the evaluation after a
        step, where the last column is the first setting's mean steps to the last target over the
        row's: the speed-up of the paper's table (supplement B).
    """
    shown = METRICS[metric]
    head = ["run", "seeds", *map(shown.after.format, after), *map(shown.until.format, targets)]
    rows = []
    for label, seeds in by_label(runs).items():
        values = [shown.values(run) for run in seeds]
        cells = [_cell([found.get(x) for found in values], confidence) for x in after]
        for target in targets:
            times = [run.time_to(metric, target) for run in seeds]
            cells.append(_cell(times, confidence, shown.digits))
        rows.append([label, len(seeds), *cells])
    if metric == "bits_per_byte" and targets:
        head.append("speed-up")
        means = [Estimate.of_all(seeds) for seeds in times_to(runs, metric, targets[-1]).values()]
        for row, mean in zip(rows, means, strict=True):
            row.append(f"{means[0].mean / mean.mean:.2f}" if means[0] and mean else "")
    return markdown_table([head, *rows])


accuracies = partial(table, metric="accuracy")


def _cell(
    values: Sequence[float | int | None], confidence: float | None = None, digits: int = 2
) -> str:
    """The mean of a setting's runs with its range or interval, to `digits` after the point."""

    def text(value: float | int) -> str:
        # Losses of a network that fits its data need more: 0.0021 is not 0.00.
        return number(value, 2) if digits and abs(value) < 0.1 else f"{value:.{digits}f}"

    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not reached" if not known else f"{len(known)} of {len(values)} reached"
    mean = text(float(np.mean(known)))
    if len(known) == 1:
        return mean
    if confidence is None:
        return f"{mean} ({text(min(known))}-{text(max(known))})"
    low, high = Estimate.of(known).interval(confidence)
    return f"{mean} [{text(low)}, {text(high)}]"


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("rezero_jax.analysis.table", __doc__)
    parser.add_argument("workdirs", type=command.workdir, nargs="+", metavar="WORKDIR")
    parser.add_argument("--epochs", nargs="*", type=int, default=[1, 2, 5, 10], metavar="E")
    parser.add_argument("--steps", nargs="*", type=int, default=[], metavar="S")
    parser.add_argument("--targets", nargs="*", type=float, default=[], metavar="VALUE")
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="P",
        help="show Student's interval of the mean over seeds at this level, such as 0.95, instead "
        "of the range",
    )
    kind = parser.add_mutually_exclusive_group()
    helps = {
        "accuracy": "test accuracy; targets are fractions, like 0.7",
        "bits_per_byte": "bits per byte of a text after --steps; speed-ups are over the first run",
    }
    for metric, text in helps.items():
        kind.add_argument(
            f"--{metric}", action="store_const", const=metric, dest="metric", help=text
        )
    parser.set_defaults(metric="loss")
    args = parser.parse_args(argv)

    def work() -> None:
        runs = [Run.read(folder) for folder in args.workdirs]
        after = args.steps if args.metric == "bits_per_byte" else args.epochs
        print(table(runs, after, args.targets, args.confidence, args.metric))

    return command.exit_status("table", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
