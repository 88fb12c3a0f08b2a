"""A Markdown table that compares runs: `python -m rezero_jax.analysis.table WORKDIR [WORKDIR ...]`.

Shows the mean training loss of chosen epochs and the epochs until chosen losses are reached. With
--accuracy it shows test accuracy instead, and with --bits_per_byte a language model's bits per byte
by step. A row is a setting: the mean and the range over the runs that differ only in the seed.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rezero_jax.analysis import command
from rezero_jax.analysis.compare import by_label, times_to
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import markdown_table, number
from rezero_jax.runs.reader import Run


def table(
    runs: Sequence[Run],
    epochs: Sequence[int],
    targets: Sequence[float],
    confidence: float | None = None,
) -> str:
    """The Markdown table: a column per epoch, then a column per target loss.

    Args:
      runs: the runs.
      epochs: after which the mean training loss (nats) is shown.
      targets: training losses (nats); shown are the epochs until each.
      confidence: of the intervals shown beside the means of several seeds, such as 0.95 (see
        `Estimate.interval`); None shows their range.
    """
    columns = [*(f"epoch {e}" for e in epochs), *(f"epochs to {t}" for t in targets)]

    def losses(run: Run) -> dict[int, float]:
        return dict(enumerate(run.epoch_losses(), 1))

    rows = _rows(runs, losses, epochs, "loss", targets, confidence, digits=2)
    return markdown_table([["run", "seeds", *columns], *rows])


def accuracies(
    runs: Sequence[Run],
    epochs: Sequence[int],
    targets: Sequence[float],
    confidence: float | None = None,
) -> str:
    """The same of test accuracy: after each of `epochs`, and the first epoch that ends at a target.

    Returns:
      A Markdown table; accuracies are percentages in it, `targets` are fractions.
    """
    columns = [*(f"epoch {e}" for e in epochs), *(f"first at {t:.0%}" for t in targets)]

    def percentages(run: Run) -> dict[int, float]:
        return {epoch: 100 * a for epoch, a in run.evaluations("eval/accuracy").items()}

    rows = _rows(runs, percentages, epochs, "accuracy", targets, confidence)
    return markdown_table([["run", "seeds", *columns], *rows])


def bits_per_byte(
    runs: Sequence[Run],
    steps: Sequence[int],
    targets: Sequence[float],
    confidence: float | None = None,
) -> str:
    """Bits per byte of the evaluations after `steps`, and the first step evaluated at a target.

    Returns:
      A Markdown table; the last column is the first run's steps to the last target over a row's:
      the speed-up of the paper's table (supplement B).
    """
    columns = [*(f"step {s:,}" for s in steps), *(f"steps to {t}" for t in targets)]

    def evaluations(run: Run) -> dict[float, float]:
        return dict(zip(*run.series("eval/bits_per_byte"), strict=True))

    rows = _rows(runs, evaluations, steps, "bits_per_byte", targets, confidence)
    if targets:
        columns.append("speed-up")
        times = list(times_to(runs, "bits_per_byte", targets[-1]).values())
        for row, reached in zip(rows, times, strict=True):
            known = None not in (*times[0], *reached)
            row.append(f"{np.mean(times[0]) / np.mean(reached):.2f}" if known else "")  # type: ignore
    return markdown_table([["run", "seeds", *columns], *rows])


def _rows(
    runs: Sequence[Run],
    values: Callable[[Run], Mapping[Any, float]],
    after: Sequence[int],
    metric: str,
    targets: Sequence[float],
    confidence: float | None,
    digits: int = 0,
) -> list[list[object]]:
    """A row for each setting: its label, its number of runs, its values and its times to targets.

    Args:
      values: of a run by epoch or step, of which those at `after` are shown.
      metric, targets: see `Run.time_to`; times are shown with `digits` after the point.
    """
    rows = []
    for label, seeds in by_label(runs).items():
        found = [values(run) for run in seeds]
        cells = [_cell([v.get(x) for v in found], confidence) for x in after]
        for target in targets:
            times = [run.time_to(metric, target) for run in seeds]
            cells.append(_cell(times, confidence, digits))
        rows.append([label, len(seeds), *cells])
    return rows


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
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
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
    kind.add_argument(
        "--accuracy", action="store_true", help="test accuracy; targets are fractions, like 0.7"
    )
    kind.add_argument(
        "--bits_per_byte",
        action="store_true",
        help="bits per byte of a text after --steps; speed-ups are over the first run",
    )
    args = parser.parse_args(argv)

    def work() -> None:
        runs = [Run.read(folder) for folder in args.workdirs]
        make = bits_per_byte if args.bits_per_byte else accuracies if args.accuracy else table
        after = args.steps if args.bits_per_byte else args.epochs
        print(make(runs, after, args.targets, args.confidence))

    return command.exit_status("table", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
