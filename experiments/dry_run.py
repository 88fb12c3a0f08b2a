"""The dry run: the operations and time that runs would take, without running any."""

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

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
FREE = ("seed=", "optim.learning_rate=")  # overrides that change no cost
LINE = "{:<17} {:<36} {:<10} {:>9} {:>10} {:>17}"


def print_costs(jobs: Mapping[str, Sequence[Job]], runs: Path) -> None:
    """Prints each experiment's runs with their status in `runs`, operations and time here."""
    rate = _matmul_rate()
    print(LINE.format("", "run", "status", "updates", "FLOPs", "time"))
    left: dict[str, float] = {}  # seconds, by run: experiments share some
    for name, needed in jobs.items():
        operations = 0.0
        for job in needed:
            costs = tuple(text for text in job.overrides if not text.startswith(FREE))
            updates, of_an_update = _size(job.config, costs)
            flops, done = updates * of_an_update, status(job, runs / job.name)
            seconds = _seconds(updates, flops / (USUAL * rate), done, runs / job.name)
            state = done.kind if done.kind != "begun" else f"at {done.step:,}"
            numbers = (f"{updates:,}", f"{flops:.2g}", _time(seconds))
            print(LINE.format(name, job.name, state, *numbers), flush=True)
            if not done.is_over:
                operations += flops
                left[job.name] = seconds
        here = sum(left.get(job.name, 0) for job in needed)
        print(LINE.format(name, "left", "", "", f"{operations:.2g}", _time(here)) + "\n")
    print(f"left: {_time(sum(left.values()))}")
    print(
        f"Times are for the updates alone, at {USUAL:.0%} of {rate:.3g} FLOP/s, the rate of a "
        "matrix product on this machine. A run that has begun continues at its own rate; one that "
        "is over shows the time it took. train.py --plan=TOPOLOGY asks an accelerator's compiler."
    )


def update_flops(config: ConfigDict) -> tuple[int, int]:
    """The updates of a run, and the floating-point operations of one of them."""
    trainer = trainer_of(config)
    return trainer.intervals.total, cost.update_flops(trainer)


def trainer_of(config: ConfigDict) -> Trainer:
    """The trainer of a run, on stand-in data where possible."""
    with config.unlocked():
        config.mesh.data = config.mesh.model = 1  # the cost is the same on any mesh
    return trainer_for_sizes(config)


@cache
def _size(config: str, overrides: tuple[str, ...]) -> tuple[int, int]:
    return update_flops(Job("", "", config, overrides).load())


def _seconds(updates: int, whole: float, done: Status, folder: Path) -> float:
    """Seconds left of a run, `whole` of a new one, or that it took if it is over."""
    if done.is_over:
        return Run.read(folder).final()["seconds"]
    left = updates - done.step
    if done.step and len(rates := Run.read(folder).series("time/step")[1]):
        return left * float(np.median(rates))
    return whole * left / updates


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2g} h" if seconds >= 36000 else duration(seconds)


def _matmul_rate() -> float:
    """Floating-point operations a second of a float32 matrix product here."""
    x = jnp.ones((SIZE, SIZE))
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(4):  # the first one compiles
        started = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(seconds)
