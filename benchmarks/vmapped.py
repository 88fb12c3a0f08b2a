"""Compares training several nets in one vmapped program with training them one after another.

    python -m benchmarks.vmapped

The speed-up is what a search of learning rates could gain. The nets are those of configs/mlp.py on
digits, each with its own parameters, all on the same batch and one device. Each turn times both
programs, without start and compilation.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.worker import spread
from rezero_jax import data
from rezero_jax.command import parser
from rezero_jax.config import load_config
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import State
from rezero_jax.training.step import make_train_step
from rezero_jax.training.trainer import Trainer

SIZES = ((8, 32), (8, 256), (32, 32), (32, 256))  # layers, width
UPDATES = 20  # updates of each net per turn


def seconds(update: Callable[[State], State], states: list[State]) -> float:
    """Seconds for UPDATES updates of each state, one state after another."""
    began = time.perf_counter()
    for state in states:
        for _ in range(UPDATES):
            state = update(state)
        jax.block_until_ready(state)
    return time.perf_counter() - began


def ratios(depth: int, width: int, nets: int, turns: int) -> list[float]:
    """Time of the nets one after another, divided by the time of all at once, by turn."""
    config = load_config(f"configs/mlp.py:depth={depth},width={width}", [])
    dataset = data.load(config.data)
    trainer = Trainer(config, dataset, jax.devices()[:1])
    optimizer, _ = make_optimizer(trainer.config.optim, trainer.intervals.total, trainer.spec)
    step = make_train_step(trainer.spec, trainer.objective, optimizer, 1, 0)
    sources = (dict(dataset.train.resident), next(trainer.batches(0)))
    batch = dataset.train.gather(*jax.tree.map(jnp.asarray, sources))
    states = [trainer.init(seed) for seed in range(nets)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    one = jax.jit(lambda state: step(state, batch)[0])
    all_at_once = jax.jit(jax.vmap(lambda state: step(state, batch)[0]))
    for update, given in ((one, states[:1]), (all_at_once, [together])):
        seconds(update, given)  # compiles
    return [seconds(one, states) / seconds(all_at_once, [together]) for _ in range(turns)]


def main() -> None:
    """Runs the command line."""
    options = parser("benchmarks.vmapped", __doc__)
    options.add_argument(
        "--nets", type=int, nargs="+", default=[4, 16], help="numbers of nets (default: 4 and 16)"
    )
    options.add_argument("--turns", type=int, default=7, help="timings per size (default: 7)")
    args = options.parse_args()
    print("| size | nets | in turn / at once: median (range) |\n| --- | --- | --- |")
    for depth, width in SIZES:
        for nets in args.nets:
            found = ratios(depth, width, nets, args.turns)
            print(f"| {depth} x {width} | {nets} | {spread(found)} |", flush=True)


if __name__ == "__main__":
    main()
