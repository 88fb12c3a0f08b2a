"""A Markdown table that compares runs: `python -m rezero_jax.analysis.table WORKDIR [WORKDIR ...]`.

Shows the mean training loss of chosen epochs and the epochs until chosen losses are reached. With
--accuracy it shows test accuracy instead, and with --bits_per_byte a language model's bits per byte
by step. A row is a setting: the mean and the range over the runs that differ only in the seed.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np

from rezero_jax.analysis import command
from rezero_jax.analysis.compare import by_label
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

    def cells(seeds: Sequence[Run]) -> list[str]:
        curves = [run.epoch_losses() for run in seeds]
        after = [[c[e - 1] if e <= len(c) else None for c in curves] for e in epochs]
        times = [[run.time_to("loss", t) for run in seeds] for t in targets]
        return [_cell(values, confidence) for values in after + times]

    columns = [*(f"epoch {e}" for e in epochs), *(f"epochs to {t}" for t in targets)]
    return _table(runs, columns, cells)


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

    def cells(seeds: Sequence[Run]) -> list[str]:
        curves = [run.evaluations("eval/accuracy") for run in seeds]
        after = [[100 * c[e] if e in c else None for c in curves] for e in epochs]
        first = [[run.time_to("accuracy", t) for run in seeds] for t in targets]
        return [_cell(values, confidence) for values in after] + [
            _cell(values, confidence, digits=0) for values in first
        ]

    columns = [*(f"epoch {e}" for e in epochs), *(f"first at {t:.0%}" for t in targets)]
    return _table(runs, columns, cells)


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

    def evaluations(run: Run) -> dict[float, float]:
        return dict(zip(*run.series("eval/bits_per_byte"), strict=True))

    def reached(seeds: Sequence[Run], target: float) -> list[float | None]:
        return [run.time_to("bits_per_byte", target) for run in seeds]

    baseline = next(iter(by_label(runs).values()))

    def cells(seeds: Sequence[Run]) -> list[str]:
        after = [_cell([evaluations(run).get(step) for run in seeds], confidence) for step in steps]
        first = [_cell(reached(seeds, target), confidence, digits=0) for target in targets]
        speed_up = [_speed_up(reached(baseline, t), reached(seeds, t)) for t in targets[-1:]]
        return after + first + speed_up

    columns = [*(f"step {s:,}" for s in steps), *(f"steps to {t}" for t in targets)]
    return _table(runs, columns + ["speed-up"] * bool(targets), cells)


def _speed_up(baseline: Sequence[float | None], steps: Sequence[float | None]) -> str:
    if None in baseline or None in steps:
        return ""
    return f"{np.mean(baseline) / np.mean(steps):.2f}"  # type: ignore[arg-type]


def _table(
    runs: Sequence[Run], columns: Sequence[str], cells: Callable[[Sequence[Run]], list[str]]
) -> str:
    """A row for each setting: its name, the number of its runs, and the cells of these runs."""
    rows = [[name, len(seeds), *cells(seeds)] for name, seeds in by_label(runs).items()]
    return markdown_table([["run", "seeds", *columns], *rows])


def _cell(
    values: Sequence[float | int | None], confidence: float | None = None, digits: int = 2
) -> str:
    """The mean of a setting and its range or interval, with so many digits after the point."""

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
        help="of Student's interval of the mean over seeds, such as 0.95, instead of the range",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--accuracy", action="store_true", help="of test accuracy; targets as fractions, like 0.7"
    )
    kind.add_argument(
        "--bits_per_byte",
        action="store_true",
        help="of a text's evaluations, after --steps; speed-ups are against the first run",
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
