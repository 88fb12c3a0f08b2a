"""Measures the tables of docs/accelerators.md on one GPU, beside predictions and PyTorch.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --torch-python=.venv-torch/bin/python

The command first prints its expected duration by row, the most valuable rows first. It ends within
20 minutes: rows for which no time is left are printed as not run. The table is that of
benchmarks/updates.py with three rows more: one set of bits from two continuations of a state,
without and with XLA's deterministic operations, and what these cost.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import updates
from benchmarks.jax_worker import endless, random_data
from benchmarks.worker import TIMING, milliseconds, print_head, print_row, take_turns
from rezero_jax.command import parser, run
from rezero_jax.errors import UserError
from rezero_jax.training.trainer import Trainer


class Row(NamedTuple):
    """A config, its baselines, and the CPU seconds that its slowest program takes to compile.

    The seconds are those of a process that compiles for an absent H200, or of PyTorch's for a CPU,
    on one core of an AMD EPYC; docs/benchmarks.md has them by program. A GPU adds the choice among
    kernels, which only the device can make and for which `measured` allows the same time again.
    """

    spec: str
    seconds: int
    baselines: list[str]


MLP = "configs/mlp.py:depth"
SMALL = "configs/transformer_small.py:steps=500,depth"
LANGUAGE = (
    f"{SMALL}=12,width=512,length=512 model.heads=8 model.positions=sinusoidal "
    "train.batch_size=32 optim.schedule=constant optim.clip_norm=None"
)
NNX = ["nnx"]  # the other baselines need PyTorch
IMAGE_MODES = ["eager", "eager-fused", "compile-fused", "compile-graphs-fused"]
LANGUAGE_MODES = ["official", "official-compile-fused", "x-transformers-flash-compile-fused"]
# The most valuable first.
WORK = (
    Row(f"{updates.ENWIK8}=128", 325, NNX),
    Row(f"{updates.ENWIK8}=12", 60, NNX),
    Row(f"{MLP}=64,dataset=cifar10", 35, NNX + IMAGE_MODES),
    Row(f"{SMALL}=48 model.positions=sinusoidal", 50, NNX),
    Row(f"{MLP}=10000,width=150,lr=0.003,dataset=cifar10", 15, NNX),
    Row(LANGUAGE, 30, NNX + LANGUAGE_MODES),
    Row("configs/resnet.py:depth=20", 30, [*NNX, *IMAGE_MODES, "channels_last-fused"]),
    Row(f"{updates.ENWIK8}=128 model.dropout=0.0", 80, NNX),
    Row("configs/resnet.py:depth=56", 75, [*NNX, *IMAGE_MODES, "channels_last-fused"]),
)
SMOKE = (
    Row("configs/mlp.py:smoke", 4, [*NNX, "eager", "compile-fused"]),
    Row("configs/resnet.py:smoke", 9, [*NNX, "channels_last-fused"]),
    Row(
        "configs/transformer_small.py:smoke model.positions=sinusoidal",
        8,
        [*NNX, "official", "x-transformers-flash-compile-fused"],
    ),
)
REPEATED = ("configs/transformer_small.py:smoke", f"{SMALL}=12")
# Seconds of the whole command, of its last rows, and of a row's start and timings.
LIMIT, LAST_ROWS, TURNS = 20 * 60, 180, 30
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def repeats(spec: str) -> bool:
    """Whether two continuations of one state by 20 updates give the same bits."""
    config = endless(spec)
    trainer = Trainer(config, random_data(config))
    batches, dispatch = trainer.batches(0), config.train.steps_per_dispatch
    start, _ = trainer.dispatch(trainer.init(), list(islice(batches, dispatch)))
    saved, ends = jax.device_get(start), []
    for _ in range(2):
        state, rest = jax.device_put(saved, trainer.placement[1]), trainer.batches(dispatch)
        for _ in range(-(-20 // dispatch)):
            state, _ = trainer.dispatch(state, list(islice(rest, dispatch)))
        ends.append(jax.tree.leaves(jax.device_get(state)))
    return all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))


def output(command: list[str], flags: str = "", until: float = math.inf) -> str:
    """The last line that a command prints, under XLA flags; `until` as in `take_turns`."""
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    left = None if until == math.inf else max(0.0, until - time.monotonic())
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} exceeded the time limit") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; see its error above")
    return done.stdout.splitlines()[-1]


def cost_of_determinism(spec: str, turns: int, until: float) -> list[str]:
    """Milliseconds of an update without and with deterministic operations."""
    worker = [sys.executable, "-m", "benchmarks.jax_worker", "ours", spec]
    flagged = ["env", f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}", *worker]
    times, _ = take_turns({"free": worker, "deterministic": flagged}, turns, 5, until=until)
    return [milliseconds(seconds) for seconds in times.values()]


def measured(row: Row, args: argparse.Namespace, until: float) -> list[list[str]]:
    """The rows of the table for one config.

    Raises:
      UserError: the config is invalid.
      RuntimeError: no time is left, or ours does not start.
    """
    if time.monotonic() + row.seconds + 2 * TIMING > until:
        raise RuntimeError("no time is left")
    if not args.smoke:
        until = min(until, time.monotonic() + 2 * (row.seconds + 2 * TIMING))
    found = [name for name in row.baselines if name in NNX or args.torch_python]
    settings = {"torch_python": args.torch_python, "turns": args.turns, "baselines": found}
    options = argparse.Namespace(generate=False, product=False, steps=5, **settings)
    return updates.rows(row.spec, options, until)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = parser("benchmarks.gpu", __doc__)
    text = "Python interpreter with PyTorch, for its baselines (default: none, and no such rows)"
    options.add_argument("--torch-python", metavar="FILE", help=text)
    options.add_argument("--turns", type=int, default=3, help="timings per program (default: 3)")
    options.add_argument("--smoke", action="store_true", help="small networks, also on a CPU")
    options.add_argument("--repeats", metavar="SPEC", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.repeats:
        print(repeats(args.repeats))
        return 0
    ends = time.monotonic() + LIMIT
    work, (small, large) = (SMOKE, REPEATED[:1] * 2) if args.smoke else (WORK, REPEATED)
    # In a process of its own, as JAX would keep a GPU's memory in this one.
    platform = output([sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"])
    if platform != "gpu" and not args.smoke:
        text = f"JAX finds no GPU here, only a {platform}; give --smoke to try the command"
        print(f"benchmarks.gpu: {text}", file=sys.stderr)
        return UserError.status
    expected = {row.spec: row.seconds + TURNS for row in work} | {"the last rows": LAST_ROWS}
    minutes = sum(expected.values()) / 60
    print(f"about {minutes:.0f} minutes with a core for each program; a GPU's choice among kernels")
    print("takes more, but after 20 minutes the command ends:")
    for name, seconds in expected.items():
        print(f"{seconds:6} s  {name}", flush=True)
    print_head(*updates.HEAD)
    failed = False

    def attempt(spec: str, rows: Callable[[], list[list[str]]]) -> None:
        nonlocal failed
        try:
            for cells in rows():
                print_row(*cells)
        except (UserError, RuntimeError) as error:
            print_row(spec, f"not measured: {error}")
            failed = True

    for row in work:
        attempt(row.spec, partial(measured, row, args, ends - LAST_ROWS))

    def same(flags: str) -> list[list[str]]:
        command = [sys.executable, "-m", "benchmarks.gpu", "--repeats", small]
        return [[small, f"the same bits again {flags}".strip(), output(command, flags, ends)]]

    def costs() -> list[list[str]]:
        return [[large, "ms, then deterministic", *cost_of_determinism(large, args.turns, ends)]]

    attempt(small, partial(same, ""))
    attempt(small, partial(same, DETERMINISTIC))
    attempt(large, costs)
    return int(failed)


if __name__ == "__main__":
    run(main)
