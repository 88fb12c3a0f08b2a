"""Diagnoses a run: `python -m rezero_jax.analysis WORKDIR`.

Prints one page on the network of the newest checkpoint, measured on the first examples of the run's
evaluation data: the growth of signals and gradients with depth, open gates, idle layers, and the
singular values of the Jacobian. Plots the same, and every gate by layer and step, to diagnosis.png
in the run folder. The command writes nothing else, so the run may still be training.

`python -m rezero_jax.analysis ablate WORKDIR` leaves out layers instead.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import jax

from rezero_jax import command
from rezero_jax.errors import printable

EXAMPLES, MANY = 16, 256
ABLATION = """\
Leaves out each layer of a run's network, and then ever more layers, the least important one first.
Prints the loss of each case, and plots it to ablation.png in the run folder."""


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    is_ablation = list(argv[:1]) == ["ablate"]
    program = "python -m rezero_jax.analysis" + " ablate" * is_ablation
    parser = command.parser(program, ABLATION if is_ablation else __doc__)
    parser.add_argument("workdir", type=command.path, metavar="WORKDIR", help="folder of the run")
    text = "checkpoint (default: the newest one); 0 is the initial network"
    parser.add_argument("--step", type=int, metavar="N", help=text)
    count = MANY if is_ablation else EXAMPLES
    text = f"examples of the evaluation data (default: {count})"
    parser.add_argument("--examples", type=int, default=count, metavar="N", help=text)
    text = "picture, a PNG, SVG or PDF file (default: in the run folder)"
    parser.add_argument("--out", type=command.path, metavar="FILE", help=text)
    text = "location of the run's data set: data.path of images or text, data.dir of other data"
    parser.add_argument("--data", metavar="PATH", help=text)
    command.add_allow(parser)
    args = parser.parse_args(argv[is_ablation:])
    return command.exit_status("analysis", partial(_study, args, is_ablation))


def _study(args: argparse.Namespace, is_ablation: bool) -> None:
    from rezero_jax.analysis.ablation import ablate, plot_ablation
    from rezero_jax.analysis.diagnosis import diagnose
    from rezero_jax.analysis.figures import plot_diagnosis
    from rezero_jax.analysis.gates import Gates
    from rezero_jax.analysis.opened import open_run
    from rezero_jax.analysis.theme import check_ending, save
    from rezero_jax.devices import cache_compilations, check_platform
    from rezero_jax.runs.files import folder_of, path_of

    name = "ablation.png" if is_ablation else "diagnosis.png"
    picture = path_of(args.out) if args.out else folder_of(args.workdir) / name
    check_ending(picture)
    cache_compilations()
    check_platform()
    run = open_run(args.workdir, args.step, data=args.data, allow=args.allow)
    batch = run.examples(args.examples)
    examples = len(jax.tree.leaves(batch)[0])
    subject = (
        f"{printable(args.workdir)} after {run.step:,} updates, means over {examples} examples"
    )
    if is_ablation:
        ablation = ablate(run.model, batch, run.losses)
        page, figure = f"{subject}\n\n{ablation}", plot_ablation(ablation)
    else:
        diagnosis = diagnose(run.model, batch, run.losses, subject)
        gates = Gates.of_run(run.log) if run.log.lines and diagnosis.is_gated.any() else None
        page = f"{diagnosis}\n\n{gates.opening}" if gates else str(diagnosis)
        figure = plot_diagnosis(diagnosis, gates)
    save(figure, picture)
    print(f"{page}\n\ndrawn in {printable(picture)}")


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
