"""Plots of runs: `python -m rezero_jax.analysis.plots WORKDIR [WORKDIR ...] [--target=VALUE]`.

Of one workdir, plots learning curves and gates by layer and step. Of several, plots their epoch
losses (language models: their evaluations by step) in one panel; runs that differ only in the seed
share a curve of their mean, with their range.
"""

import sys
from collections.abc import Sequence

from rezero_jax import command
from rezero_jax.analysis.plots.curves import write_plot


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m rezero_jax.analysis.plots", __doc__)
    parser.add_argument("workdirs", type=command.workdir, nargs="+", metavar="WORKDIR")
    parser.add_argument(
        "--target",
        type=float,
        metavar="VALUE",
        help="training loss, or bits per byte of language models: plot when each setting reached "
        "it, with 95 %% intervals over seeds (default: plot curves)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="picture, a PNG, SVG or PDF file (default: curves.png in the first workdir)",
    )
    args = parser.parse_args(argv)
    return command.exit_status(
        "plots", lambda: print(f"wrote {write_plot(args.workdirs, args.out, args.target)}")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
