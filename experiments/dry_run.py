"""The dry run: the operations and time that experiments would take, without running any."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.jobs import Job, Status, status
from rehearsal.plan import trainer_for_sizes
from rezero_jax.formatting import duration
from rezero_jax.runs.reader import Run
from rezero_jax.training import cost
from rezero_jax.training.trainer import Trainer

SIZE = 2048  # of the matrices whose product is timed
USUAL = 0.4  # the share of that rate that training reaches


class Cost(NamedTuple):
    """The cost of a run.

    Attributes:
      updates: from the run's beginning to its end.
      flops: of all updates.
      seconds: that the run will take, or that it took if it is over.
    """

    updates: int
    flops: int
    seconds: float


def print_costs(jobs: Mapping[str, Sequence[Job]], runs: Path) -> None:
    """Prints every run of each experiment with its status, operations and time on this machine.

    Args:
      jobs: of each experiment.
      runs: the folder that holds their run folders.
    """
    rate = _matmul_rate()
    form = "{:<17} {:<36} {:<10} {:>9} {:>10} {:>17}"
    print(form.format("", "run", "status", "updates", "FLOPs", "time"))
    known: dict[str, tuple[int, int]] = {}
    total, seen = 0.0, set[str]()
    for name, needed in jobs.items():
        seconds = operations = 0.0
        for job in needed:
            done = status(job, runs / job.name)
            cost = _cost(job, rate, known)
            cost = cost._replace(seconds=_seconds_left(cost, done, runs / job.name))
            state = done.kind if done.kind != "begun" else f"at {done.step:,}"
            numbers = (f"{cost.updates:,}", f"{cost.flops:.2g}", _time(cost.seconds))
            print(form.format(name, job.name, state, *numbers), flush=True)
            if not done.is_over:
                operations += cost.flops
                seconds += cost.seconds
                total += cost.seconds * (job.name not in seen)
                seen.add(job.name)
        print(form.format(name, "left", "", "", f"{operations:.2g}", _time(seconds)) + "\n")
    print(f"left: {_time(total)}")
    print(
        f"Times are for the updates alone, at {USUAL:.0%} of {rate:.3g} FLOP/s, the rate of a "
        "matrix product on this machine. A run that has begun continues at its own rate; one that "
        "is over shows the time it took. train.py --plan=TOPOLOGY asks an accelerator's compiler."
    )


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2g} h" if seconds >= 36000 else duration(seconds)


def _cost(job: Job, rate: float, known: dict[str, tuple[int, int]]) -> Cost:
    """The cost of a whole job at a usual share of the machine's rate.

    Args:
      rate: floating-point operations a second.
      known: updates and FLOPs of the kinds of run seen so far, filled here.
    """
    config = job.load()
    fields: Mapping = json.loads(config.to_json())
    kind = json.dumps([fields["model"], fields["data"], fields["train"], fields["optim"]["name"]])
    if kind not in known:
        known[kind] = update_flops(config)
    updates, of_an_update = known[kind]
    flops = updates * of_an_update
    return Cost(updates, flops, flops / (USUAL * rate))


def update_flops(config: ConfigDict) -> tuple[int, int]:
    """The updates of a run, and the floating-point operations of one of them."""
    trainer = trainer_of(config)
    return trainer.intervals.total, cost.update_flops(trainer)


def trainer_of(config: ConfigDict) -> Trainer:
    """The trainer of a run, on stand-in data where possible."""
    with config.unlocked():
        config.mesh.data = config.mesh.model = 1  # the cost is the same on any mesh
    return trainer_for_sizes(config)


def _seconds_left(cost: Cost, done: Status, folder: Path) -> float:
    """Seconds left of a run on this machine, or that it took if it is over."""
    if done.is_over:
        return Run.read(folder).final()["seconds"]
    left = cost.updates - done.step
    if done.step and len(rates := Run.read(folder).series("time/step")[1]):
        return left * float(np.median(rates))
    return cost.seconds * left / cost.updates


def _matmul_rate() -> float:
    """Floating-point operations a second of a float32 matrix product here."""
    x = jnp.ones((SIZE, SIZE))
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(seconds)
