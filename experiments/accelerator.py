"""The time of the paper's settings on eight chips of a TPU v5e, as its compiler estimates.

    python -m experiments.accelerator docs/paper/v5e-8.json

This needs the compiler that `make rehearse` installs. One network of each size is compiled, that of
ReZero where there is one. Evaluations and checkpoints are left out.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

from experiments import arguments, compare
from experiments.dry_run import FREE, trainer_of, update_flops
from experiments.jobs import DESCRIPTIONS, Job, planned, with_seeds
from experiments.summary import CLAIMS
from rehearsal.plan import plan
from rehearsal.topologies import NoCompiler
from rezero_jax import command
from rezero_jax.runs.files import write_json
from rezero_jax.training.cost import PEAK_FLOPS

TOPOLOGY = "v5e:2x4"
GPU = "1xh200"
# Measured with 12 and 48 layers of configs/transformer_small.py, see docs/benchmarks.md.
SHARE = 0.014
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
    jobs = {n: with_seeds(planned(n, "paper"), n, "paper", None) for n in DESCRIPTIONS}
    comparisons = {n: t for n, t in CLAIMS["gpu"].items() if t.startswith("compare ")}
    jobs |= {name: jobs_of(text)[0] for name, text in comparisons.items()}
    prediction = Prediction(TOPOLOGY)
    costs = []
    for name, needed in jobs.items():
        updates, seconds = prediction.total(needed)
        if needed:
            numbers = {"runs": len(needed), "updates": updates, "seconds": seconds}
            costs.append({"experiment": name} | numbers)
            print(costs[-1], file=sys.stderr, flush=True)
    write_json(path, {"topology": TOPOLOGY, "costs": costs})


def jobs_of(text: str) -> tuple[list[Job], str]:
    """The certain runs of a command line of `experiments`, and the folder above "runs" in --out."""
    name, *words = shlex.split(text)
    if name == "compare":
        return [*chain(*compare.parsed(words)[1].certain().values())], ""
    parser = argparse.ArgumentParser()
    arguments.add_runs(parser)
    args = parser.parse_args(words)
    return with_seeds(planned(name, args.scale), name, args.scale, args.seeds), args.scale


class Prediction:
    """The time of updates on a topology: by its compiler, or by FLOPs where that is absent.

    Attributes:
      basis: how the last times were predicted, in words.
    """

    def __init__(self, topology: str):
        self.basis = f"as the compiler for {topology} estimates"
        self._topology = topology
        self._per_update: dict[tuple[Any, ...], float] = {}  # seconds

    def total(self, jobs: Sequence[Job]) -> tuple[int, float]:
        """The updates of all runs, and their time in seconds, one run after another."""
        updates, seconds = 0, 0.0
        # ReZero's nets first, so that they represent their size.
        for job in sorted(jobs, key=lambda job: job.load().model.residual != "rezero"):
            config = job.load()
            size = (config.train.batch_size, *(config.model.get(key) for key in SIZES))
            if size not in self._per_update:
                self._per_update[size] = self._of_an_update(job)
            free = tuple(text for text in job.overrides if not text.startswith(FREE))
            count = _updates(job.config, free)
            updates, seconds = updates + count, seconds + count * self._per_update[size]
        return updates, seconds

    def _of_an_update(self, job: Job) -> float:
        try:
            account = plan(job.load(), self._topology)
        except NoCompiler:
            if self._topology != GPU:
                raise
            self.basis = (
                f"by FLOPs at {SHARE:.1%} of the peak of an H200, as configs/transformer_small.py "
                "reached there (larger networks reach more), because the GPU compiler is absent"
            )
            return update_flops(job.load())[1] / (SHARE * PEAK_FLOPS["NVIDIA H200"])
        dispatch = account["estimate_of_a_dispatch"] / account["updates_per_dispatch"]
        return account["estimate"] + account["kernels_at_least"] + dispatch


@cache
def _updates(config: str, overrides: tuple[str, ...]) -> int:
    return trainer_of(Job("", "", config, overrides).load()).intervals.total


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
