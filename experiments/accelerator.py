"""The time of the paper's settings on eight chips of a TPU v5e, as its compiler estimates.

    python -m experiments.accelerator docs/paper/v5e-8.json

This needs the compiler that `make rehearse` installs. One network of each size is compiled, that of
ReZero where there is one. Evaluations and checkpoints are left out.
"""

import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from experiments import compare
from experiments.dry_run import trainer_of
from experiments.jobs import DESCRIPTIONS, Job, planned
from experiments.summary import CLAIMS
from rehearsal.plan import plan
from rezero_jax import command
from rezero_jax.runs.files import write_json

TOPOLOGY = "v5e:2x4"
# Fields that decide the time of an update; the residual rule is left out.
SIZES = ("name", "family", "depth", "width", "length", "max_len")


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = command.parser("python -m experiments.accelerator", __doc__)
    parser.add_argument("path", type=command.path, metavar="FILE.json", help="where to write")
    args = parser.parse_args(argv)
    return command.exit_status("experiments.accelerator", lambda: write_costs(args.path))


def write_costs(path: str) -> None:
    """Writes a JSON file with the cost of each experiment that has runs, and each comparison."""
    jobs = {n: planned(n, "paper") * about.seeds for n, about in DESCRIPTIONS.items()} | compared()
    per_update: dict[tuple[Any, ...], float] = {}  # seconds
    costs = []
    for name, needed in jobs.items():
        updates, seconds = 0, 0.0
        # ReZero's nets first, so that they represent their size.
        for job in sorted(needed, key=lambda job: job.load().model.residual != "rezero"):
            config = job.load()
            size = (config.train.batch_size, *(config.model.get(key) for key in SIZES))
            if size not in per_update:
                account = plan(job.load(), TOPOLOGY)
                dispatch = account["estimate_of_a_dispatch"] / account["updates_per_dispatch"]
                per_update[size] = account["estimate"] + account["kernels_at_least"] + dispatch
            total = trainer_of(config).intervals.total
            updates, seconds = updates + total, seconds + total * per_update[size]
        if needed:
            numbers = {"runs": len(needed), "updates": updates, "seconds": seconds}
            costs.append({"experiment": name} | numbers)
            print(costs[-1], file=sys.stderr, flush=True)
    write_json(path, {"topology": TOPOLOGY, "costs": costs})


def compared() -> dict[str, list[Job]]:
    """The runs of the comparisons that claims.toml names under [costs]."""
    commands = CLAIMS["costs"]
    plans = {name: compare.parsed(shlex.split(text))[1] for name, text in commands.items()}
    return {name: [*chain(*plan.certain().values())] for name, plan in plans.items()}


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
