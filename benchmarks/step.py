"""The training step of train.py, timed."""

import resource
import time
from collections.abc import Callable
from itertools import islice

import jax
from ml_collections import ConfigDict

from benchmarks.worker import serve
from rezero_jax.data import Dataset, Text
from rezero_jax.training.trainer import Trainer


def serve_training(config: ConfigDict, dataset: Dataset | Text) -> None:
    """Serves timings of updates, `train.steps_per_dispatch` of them in one dispatch."""
    serve(updates_of(Trainer(config, dataset)))


def updates_of(trainer: Trainer) -> Callable[[int], None]:
    """steps(n), which makes n more updates, by whole dispatches and a rest, and waits for them."""
    state, batches = trainer.init(), trainer.batches(0)
    dispatch = trainer.config.train.steps_per_dispatch

    def steps(count: int) -> None:
        nonlocal state
        for start in range(0, count, dispatch):
            many = list(islice(batches, min(dispatch, count - start)))
            state, report = trainer.dispatch(state, many)
        jax.block_until_ready((state, report))

    return steps


def first_updates(config: ConfigDict, dataset: Dataset | Text) -> dict[str, float]:
    """Seconds from nothing to the end of the first update, and of the fastest of the next three."""
    started = time.perf_counter()
    trainer = Trainer(config, dataset)
    state, batches = trainer.init(), trainer.batches(0)
    seconds = []
    for _ in range(4):
        state, report = trainer.dispatch(state, [next(batches)])
        jax.block_until_ready((state, report))
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return {"first": seconds[0], "later": min(seconds[1:])}


def peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
