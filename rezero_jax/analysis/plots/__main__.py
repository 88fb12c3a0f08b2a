"""Plots of runs: `python -m rezero_jax.analysis.plots WORKDIR [WORKDIR ...] [--target=VALUE]`.

One workdir gives its learning curves and its gates by layer and step; several give their epoch
losses in one panel, or of language models the evaluations by step, runs that differ in the seed
alone as their mean and range.
"""

import sys
from collections.abc import Sequence

from rezero_jax.analysis import command
from rezero_jax.analysis.plots.curves import write_plot


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("rezero_jax.analysis.plots", __doc__)
    parser.add_argument("workdirs", type=command.workdir, nargs="+", metavar="WORKDIR")
    parser.add_argument(
        "--target",
        type=float,
        metavar="VALUE",
        help="show when each setting reached this training loss, or a language model's bits per "
        "byte, with 95 %% intervals over seeds",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="PNG, SVG, PDF; default: curves.png in the first workdir"
    )
    args = parser.parse_args(argv)
    return command.exit_status(
        "plots", lambda: print(f"wrote {write_plot(args.workdirs, args.out, args.target)}")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
