"""Diagnoses a run: `python -m rezero_jax.analysis WORKDIR`.

Prints one page on the network of the newest checkpoint, measured on the first examples of the run's
evaluation data: the growth of signals and gradients with depth, open gates, idle layers, and the
singular values of the Jacobian. Plots the same, and every gate by layer and step, to diagnosis.png
in the run folder. The command writes nothing else, so the run may still be training.
"""

import sys
from collections.abc import Sequence
from functools import partial

import jax
from etils import epath

from rezero_jax import command
from rezero_jax.analysis.diagnosis import diagnose
from rezero_jax.analysis.figures import plot_diagnosis
from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.theme import check_ending, save
from rezero_jax.devices import cache_compilations
from rezero_jax.runs.files import folder_of
from rezero_jax.runs.reader import Run
from rezero_jax.training.load import load_model

EXAMPLES = 16


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m rezero_jax.analysis", __doc__)
    parser.add_argument("workdir", type=command.path, metavar="WORKDIR", help="the run's folder")
    text = "picture, a PNG, SVG or PDF file (default: diagnosis.png in the run folder)"
    parser.add_argument("--out", metavar="FILE", help=text)
    text = "where the run's data set is: data.path of images or text, data.dir of other data"
    parser.add_argument("--data", metavar="PATH", help=text)
    command.add_allow(parser)
    args = parser.parse_args(argv)
    work = partial(_diagnose, args.workdir, args.out, args.data, args.allow)
    return command.exit_status("analysis", work)


def _diagnose(workdir: str, out: str | None, source: str | None, allow: Sequence[str]) -> None:
    picture = epath.Path(out) if out else folder_of(workdir) / "diagnosis.png"
    check_ending(picture)
    cache_compilations()
    model, step, trainer = load_model(workdir, source=source, allow=allow)
    batch = trainer.examples(EXAMPLES)
    examples = len(jax.tree.leaves(batch)[0])
    diagnosis = diagnose(
        model,
        batch,
        lambda model, batch: trainer.objective(model, batch, jax.random.key(0))["loss"],
        f"{workdir} after {step:,} updates, means over {examples} examples",
    )
    run = Run.read(workdir)
    gates = Gates.of_run(run) if run.lines and diagnosis.is_gated.any() else None
    save(plot_diagnosis(diagnosis, gates), picture)
    print(f"{diagnosis}\n\ndrawn in {picture}")


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
