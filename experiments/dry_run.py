"""The dry run: what experiments would cost in operations and time, before anything is run."""

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
from rezero_jax.data import stand_in
from rezero_jax.formatting import duration
from rezero_jax.runs.reader import Run
from rezero_jax.training.cost import Accelerator
from rezero_jax.training.plan import USUAL, usual_seconds
from rezero_jax.training.trainer import Trainer

SIZE = 2048  # of the matrices whose product is timed


def print_costs(jobs: Mapping[str, Sequence[Job]], runs: Path, chip: Accelerator | None) -> None:
    """Prints every run of each experiment with its status, operations and time.

    Args:
      jobs: of each experiment.
      runs: the folder that holds their run folders.
      chip: what they would run on; None for this machine, whose rate is measured.
    """
    estimator = Estimator(chip)
    form = "{:<17} {:<36} {:<10} {:>9} {:>10} {:>17}"
    print(form.format("", "run", "status", "updates", "FLOPs", "time"))
    total, seen = 0.0, set[str]()
    for name, needed in jobs.items():
        seconds = operations = 0.0
        for job in needed:
            done = status(job, runs / job.name)
            cost = estimator.cost(job, runs / job.name, done)
            told = done.kind if done.kind != "begun" else f"at {done.step:,}"
            flops = cost.updates * cost.flops
            print(
                form.format(
                    name, job.name, told, f"{cost.updates:,}", f"{flops:.2g}", _time(cost.seconds)
                ),
                flush=True,
            )
            if chip or not done.is_over:
                operations += flops
                seconds += cost.seconds
                total += cost.seconds * (job.name not in seen)
                seen.add(job.name)
        what = "together" if chip else "left"
        print(form.format(name, what, "", "", f"{operations:.2g}", _time(seconds)) + "\n")
    where = estimator.chip.kind
    print(f"all, each run once: {_time(total)} on one {where}" if chip else f"left: {_time(total)}")
    rate = f"{estimator.chip.float32:.3g} FLOP/s"
    print(
        f"Times are those of the updates alone, at {USUAL:.0%} of {rate}, "
        + (
            f"the peak of {where} on float32; small networks are bound by latency and take longer."
            if chip
            else "that of a matrix product here; a run that has begun continues at its own rate; "
            "of one that is done it is the time that it took."
        )
    )


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2g} h" if seconds >= 36000 else duration(seconds)


class Cost(NamedTuple):
    """Of a run.

    Attributes:
      updates: from its beginning to its end.
      flops: of one update.
      seconds: that it will take, or of a run that is over took.
    """

    updates: int
    flops: int
    seconds: float


class Estimator:
    """Costs of jobs.

    Args:
      chip: what they would run on; None for this machine, whose rate is measured.
    """

    def __init__(self, chip: Accelerator | None = None):
        rate = 0.0 if chip else _matmul_rate()
        self.chip = chip or Accelerator("this machine", rate, rate, 0.0)
        self._is_here = chip is None
        self._flops: dict[str, int] = {}

    def cost(self, job: Job, folder: Path, done: Status) -> Cost:
        """The cost of what is left of a job, or of one that is over the time it took.

        On this machine a run that has begun continues at its own rate; otherwise the time is that
        of the operations at a usual share of the peak, as by `train.py --plan`.
        """
        config = job.load()
        with config.unlocked():
            config.mesh.data = config.mesh.model = 1  # what it costs is the same on any mesh
        trainer = Trainer(config, dataset) if (dataset := stand_in(config.data)) else None
        trainer = trainer or Trainer.from_config(config)
        total = trainer.intervals.total
        kind = _without_length(config)
        if kind not in self._flops:
            self._flops[kind] = trainer.flops()
        flops, peak = self._flops[kind], self.chip.peak(config.model.dtype)
        if not self._is_here:
            return Cost(total, flops, usual_seconds(total * flops, peak))
        if done.is_over:
            return Cost(total, flops, Run.read(folder).final()["seconds"])
        left = total - done.step
        if done.step and len(rates := Run.read(folder).series("time/step")[1]):
            return Cost(total, flops, left * float(np.median(rates)))
        return Cost(total, flops, usual_seconds(left * flops, peak))


def _without_length(config: ConfigDict) -> str:
    """What decides the cost of an update."""
    fields: Mapping = json.loads(config.to_json())
    model, data, train = fields["model"], fields["data"], fields["train"]
    return json.dumps([model, data, train["batch_size"], train["accumulate"]])


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
