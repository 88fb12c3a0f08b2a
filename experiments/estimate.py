"""What experiments would cost: floating-point operations and time, before anything is run."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.jobs import Job, State
from rezero_jax.runs.reader import Run
from rezero_jax.training.cost import Accelerator
from rezero_jax.training.plan import trainer_for_sizes, usual_seconds

SIZE = 2048  # of the matrices whose product is timed


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

    def cost(self, job: Job, folder: Path, done: State) -> Cost:
        """The cost of what is left of a job, or of one that is over the time it took.

        On this machine a run that has begun goes on at its own rate; otherwise the time is that
        of the operations at a usual share of the peak, as by `train.py --plan`.
        """
        config = job.load()
        with config.unlocked():
            config.mesh.data = config.mesh.model = 1  # what it costs is the same on any mesh
        program = trainer_for_sizes(config)
        total = program.intervals.total
        kind = _without_length(config)
        if kind not in self._flops:
            self._flops[kind] = program.flops()
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
