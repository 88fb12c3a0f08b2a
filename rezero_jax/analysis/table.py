"""Runs side by side, as Markdown: `python -m rezero_jax.analysis.table WORKDIR [WORKDIR ...]`.

Prints the mean training loss of chosen epochs and the epochs until chosen losses are reached, or
the same of test accuracy, one row per setting, with the mean and the range over the runs that
differ in the seed alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np

from rezero_jax.analysis.runs import Run, by_label, epochs_to
from rezero_jax.errors import UserError


def table(runs: Sequence[Run], epochs: Sequence[int], targets: Sequence[float]) -> str:
    """The Markdown table: a column per epoch, then a column per target loss."""

    def cells(group: Sequence[Run]) -> list[str]:
        curves = [run.epoch_losses() for run in group]
        after = [_cell([c[e - 1] if e <= len(c) else None for c in curves]) for e in epochs]
        return after + [_cell([epochs_to(c, t) for c in curves]) for t in targets]

    columns = [*(f"epoch {e}" for e in epochs), *(f"epochs to {t}" for t in targets)]
    return _markdown(runs, columns, cells)


def accuracies(runs: Sequence[Run], epochs: Sequence[int], targets: Sequence[float]) -> str:
    """The same of test accuracy: after each of `epochs`, and the first epoch that ends at a target.

    Returns:
      A Markdown table; accuracies are percentages in it, `targets` are fractions.
    """

    def cells(group: Sequence[Run]) -> list[str]:
        curves = [run.evaluations("eval/accuracy") for run in group]
        after = [_cell([100 * c[e] if e in c else None for c in curves]) for e in epochs]
        first = [
            [min((e for e, a in c.items() if a >= t), default=None) for c in curves]
            for t in targets
        ]
        return after + [_cell(values, digits=0) for values in first]

    columns = [*(f"epoch {e}" for e in epochs), *(f"first at {t:.0%}" for t in targets)]
    return _markdown(runs, columns, cells)


def _markdown(
    runs: Sequence[Run], columns: Sequence[str], cells: Callable[[Sequence[Run]], list[str]]
) -> str:
    """A row for each setting: its name, the number of its runs, and the cells of these runs."""
    head = ["run", "seeds", *columns]
    rows = [head, ["---"] * len(head)]
    rows += [[name, str(len(group)), *cells(group)] for name, group in by_label(runs).items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(values: Sequence[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not reached" if not known else f"{len(known)} of {len(values)} reached"
    mean, low, high = (f"{x:.{digits}f}" for x in (np.mean(known), min(known), max(known)))
    return mean if len(known) == 1 else f"{mean} ({low}-{high})"


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--epochs", nargs="*", type=int, default=[1, 2, 5, 10], metavar="E")
    parser.add_argument("--targets", nargs="*", type=float, default=[], metavar="VALUE")
    parser.add_argument(
        "--accuracy", action="store_true", help="of test accuracy; targets as fractions, like 0.7"
    )
    args = parser.parse_args(argv)
    try:
        make = accuracies if args.accuracy else table
        print(make([Run.read(folder) for folder in args.workdirs], args.epochs, args.targets))
    except UserError as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
