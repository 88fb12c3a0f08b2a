"""The training step of train.py, timed."""

import resource
from itertools import islice

import jax
from ml_collections import ConfigDict

from benchmarks.worker import serve
from rezero_jax.data import Dataset, Text
from rezero_jax.training.trainer import Trainer


def serve_training(config: ConfigDict, dataset: Dataset | Text) -> None:
    """Serves timings of updates, `train.steps_per_dispatch` of them in one dispatch."""
    program = Trainer(config, dataset)
    state, batches = program.init(), program.batches(0)
    group = config.train.steps_per_dispatch

    def steps(count: int) -> None:
        nonlocal state
        for start in range(0, count, group):
            many = list(islice(batches, min(group, count - start)))
            state, report = program.dispatch(state, many)
        jax.block_until_ready((state, report))

    serve(steps)


def peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
