"""Measures the tables of docs/accelerators.md on one GPU, beside predictions and PyTorch.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --torch-python=.venv-torch/bin/python

The command prints its expected duration, and then the table of benchmarks/updates.py with three
rows more: one set of bits from two continuations of a state, without and with XLA's deterministic
operations, and what these cost. After 17 minutes it starts no further config.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import islice

import jax
import numpy as np

from benchmarks import updates
from benchmarks.jax_worker import endless, random_data
from benchmarks.worker import milliseconds, print_head, print_row, take_turns
from rezero_jax.command import parser, run
from rezero_jax.errors import UserError
from rezero_jax.training.trainer import Trainer

MLP = "configs/mlp.py:depth"
SMALL = "configs/transformer_small.py:steps=500,depth"
LANGUAGE = (
    f"{SMALL}=12,width=512,length=512 model.heads=8 model.positions=sinusoidal "
    "train.batch_size=32 optim.schedule=constant optim.clip_norm=None"
)
NNX = ["nnx"]
IMAGE_MODES = ["eager", "eager-fused", "compile-fused", "compile-graphs-fused"]
LANGUAGE_MODES = ["official", "official-compile-fused", "x-transformers-flash-compile-fused"]
# Configs and their baselines; those other than NNX need PyTorch.
WORK = {
    f"{updates.ENWIK8}=128": NNX,
    f"{updates.ENWIK8}=128 model.dropout=0.0": NNX,
    f"{updates.ENWIK8}=12": NNX,
    f"{SMALL}=48 model.positions=sinusoidal": NNX,
    f"{MLP}=10000,width=150,lr=0.003,dataset=cifar10": NNX,
    f"{MLP}=64,dataset=cifar10": NNX + IMAGE_MODES,
    "configs/resnet.py:depth=20": NNX + IMAGE_MODES + ["channels_last-fused"],
    "configs/resnet.py:depth=56": NNX + IMAGE_MODES + ["channels_last-fused"],
    LANGUAGE: NNX + LANGUAGE_MODES,
}
SMOKE = {"configs/mlp.py:smoke": NNX}
REPEATED = ("configs/transformer_small.py:smoke", f"{SMALL}=12")
# Seconds until the programs of a config, which start together, and of the last rows are compiled
# (assumed, never measured), and seconds after which no further config starts.
START, LAST_ROWS, LATEST = 75, 120, 17 * 60
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


def repeats_in_a_process(spec: str, flags: str) -> dict[str, bool | str]:
    """JAX's platform and the result of `repeats`, as "platform" and "same", under XLA flags."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--repeats", spec]
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed; see its error above")
    return json.loads(done.stdout.splitlines()[-1])


def cost_of_determinism(spec: str, turns: int) -> list[str]:
    """Milliseconds of an update without and with deterministic operations."""
    worker = [sys.executable, "-m", "benchmarks.jax_worker", "ours", spec]
    flagged = ["env", f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}", *worker]
    times, _ = take_turns({"free": worker, "deterministic": flagged}, turns, 5)
    return [milliseconds(seconds) for seconds in times.values()]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = parser("benchmarks.gpu", __doc__)
    text = "Python interpreter with PyTorch, for its baselines (default: none, and no such rows)"
    options.add_argument("--torch-python", metavar="FILE", help=text)
    options.add_argument("--turns", type=int, default=3, help="timings per program (default: 3)")
    options.add_argument("--smoke", action="store_true", help="a small network, also on a CPU")
    options.add_argument("--repeats", metavar="SPEC", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.repeats:
        same = repeats(args.repeats)
        print(json.dumps({"platform": jax.devices()[0].platform, "same": same}))
        return 0
    small, large = REPEATED if not args.smoke else (REPEATED[0],) * 2
    free = repeats_in_a_process(small, "")
    if free["platform"] != "gpu" and not args.smoke:
        raise UserError(f"JAX finds no GPU here, only a {free['platform']}; give --smoke to try it")
    started, work = time.monotonic(), SMOKE if args.smoke else WORK
    print(
        f"about {(START * len(work) + LAST_ROWS) / 60:.0f} minutes, mostly to compile", flush=True
    )
    print_head(*updates.HEAD)
    failed = False
    for spec, baselines in work.items():
        if time.monotonic() > started + LATEST:
            print_row(spec, f"not measured within {LATEST // 60} minutes")
            failed = True
            continue
        found = [name for name in baselines if name == "nnx" or args.torch_python]
        settings = {"torch_python": args.torch_python, "turns": args.turns, "baselines": found}
        try:
            for row in updates.rows(
                spec, argparse.Namespace(generate=False, product=False, steps=5, **settings)
            ):
                print_row(*row)
        except (UserError, RuntimeError) as error:
            print_row(spec, f"failed: {error}")
            failed = True
    print_row(small, "the same bits again", free["same"])
    flagged = repeats_in_a_process(small, DETERMINISTIC)
    print_row(small, "the same bits again, deterministic", flagged["same"])
    without, with_flag = cost_of_determinism(large, args.turns)
    print_row(large, "ms, then deterministic", without, with_flag)
    return int(failed)


if __name__ == "__main__":
    run(main)
