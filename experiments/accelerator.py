"""The time of the paper's settings on eight chips of a TPU v5e, as its compiler estimates.

    python -m experiments.accelerator docs/paper/v5e-8.json

This needs the compiler that `make rehearse` installs, and some minutes. One network is compiled for
each size, ReZero's where there is one; its baselines are assumed to take the same time.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import compare
from experiments.__main__ import EXPERIMENTS
from experiments.dry_run import trainer_of
from experiments.experiment import DESCRIPTIONS
from experiments.jobs import Job
from rehearsal.plan import plan
from rezero_jax.runs.files import write_json

TOPOLOGY = "v5e:2x4"
# Fields that decide the time of an update; the residual rule is left out.
SIZES = ("name", "family", "depth", "width", "length", "max_len")
# The language models of experiments/protocol.md, E2, as first registered.
LANGUAGE_MODEL = compare.Plan(
    "configs/transformer_small.py:steps=2000",
    ("optim.warmup_steps=100",),
    ("rezero", "pre_norm", "layerscale", "post_norm", "deep_norm", "rezero_frozen"),
    depths=(12,),
    seeds=5,
    rates=5,
    factor=2,
    tuning_seeds=1,
)
COMPARISONS = {
    "E2: 12 layers, 2,000 updates": LANGUAGE_MODEL,
    "E2: 48 layers, 1,000 updates": LANGUAGE_MODEL._replace(
        config="configs/transformer_small.py:steps=1000",
        overrides=("optim.warmup_steps=50",),
        rules=("rezero", "pre_norm", "deep_norm"),
        depths=(48,),
        seeds=3,
        rates=3,
    ),
}


class Cost(NamedTuple):
    """The cost of an experiment at the paper's scale, or of a comparison.

    Attributes:
      runs: of all settings and seeds; of an experiment the paper's number.
      updates, seconds: of all runs; evaluations and checkpoints are left out.
    """

    experiment: str
    runs: int
    updates: int
    seconds: float


def main(argv: Sequence[str]) -> None:
    """Writes a JSON file with the cost of each experiment that has runs, and each comparison."""
    per_update: dict[tuple[Any, ...], float] = {}
    costs = []
    planned = {
        name: experiment.runs("paper") * DESCRIPTIONS[name].seeds
        for name, experiment in EXPERIMENTS.items()
    }
    for name, chosen in COMPARISONS.items():
        planned[name] = [job for jobs in chosen.certain().values() for job in jobs]
    for name, jobs in planned.items():
        if jobs:
            costs.append(_cost(name, jobs, per_update)._asdict())
            print(costs[-1], file=sys.stderr, flush=True)
    write_json(Path(argv[0]), {"topology": TOPOLOGY, "costs": costs})


def _cost(name: str, jobs: Iterable[Job], per_update: dict[tuple[Any, ...], float]) -> Cost:
    """The cost of an experiment; `per_update` keeps the seconds of an update by size."""
    runs, total, seconds = 0, 0, 0.0
    # ReZero's nets first, so that they represent their size.
    for job in sorted(jobs, key=lambda job: job.load().model.residual != "rezero"):
        config = job.load()
        size = (config.train.batch_size, *(config.model.get(key) for key in SIZES))
        if size not in per_update:
            per_update[size] = _update(job)
        updates = trainer_of(config).intervals.total
        runs, total, seconds = runs + 1, total + updates, seconds + updates * per_update[size]
    return Cost(name, runs, total, seconds)


def _update(job: Job) -> float:
    """The estimated seconds of an update, with its share of a dispatch."""
    account = plan(job.load(), TOPOLOGY)
    dispatch = account["estimate_of_a_dispatch"] / account["updates_per_dispatch"]
    return account["estimate"] + account["kernels_at_least"] + dispatch


if __name__ == "__main__":
    main(sys.argv[1:])
