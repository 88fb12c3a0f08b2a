"""Time and memory of the first updates: by depth, and by rematerialisation and accumulation.

    python -m benchmarks.memory

Each row is a separate process that makes four updates, one per dispatch. "first" counts from the
construction of the network, after imports, and includes initialisation and compilation. "beyond the
state" subtracts the memory before the first update: the program, the data and the state. The loss
of the third update shows that rows that differ in remat and accumulation are equivalent.
"""

import json
import resource
import subprocess
import sys
import time
from argparse import SUPPRESS

import jax
import numpy as np

from benchmarks.jax_worker import endless, random_data
from benchmarks.worker import print_head, print_row
from rezero_jax.command import parser, run
from rezero_jax.devices import set_cpu_devices
from rezero_jax.training.trainer import Trainer

MLP, TRANSFORMER = "configs/mlp.py:dataset=cifar10,depth=", "configs/transformer_small.py:depth="
ALONE = "mesh.cpu_devices=None train.steps_per_dispatch=1"
CONFIGS = (
    *(f"{MLP}{depth},width=150,lr=0.003" for depth in (100, 1000, 10_000)),
    *(
        f"{TRANSFORMER}{depth},width=256,length=256 model.heads=8 model.scan=True "
        "train.batch_size=8"
        for depth in (12, 64, 128)
    ),
    *(
        f"{network} {ALONE} model.remat={remat} train.accumulate={count}"
        for network in (
            f"{MLP}1000,width=256 train.batch_size=1000",
            f"{TRANSFORMER}1000,width=64,length=128 model.heads=4 model.scan=True "
            "train.batch_size=4",
        )
        for remat, count in (("none", 1), ("full", 1), ("none", 4), ("full", 4))
    ),
)


def first_updates(spec: str) -> dict[str, float]:
    """Times in seconds and memory in GiB of the first four updates, one per dispatch.

    Returns:
      "first", from the construction to the end of the first update; "later", the fastest later
      update; "held" and "peak", peak memory before the first update and at the end; "loss", of the
      third update.
    """
    config = endless(spec)
    if config.mesh.cpu_devices is not None:
        set_cpu_devices(config.mesh.cpu_devices)
    dataset = random_data(config)
    started = time.perf_counter()
    trainer = Trainer(config, dataset)
    state, batches = jax.block_until_ready(trainer.init()), trainer.batches(0)
    held, seconds, losses = peak_gib(), [], []
    for _ in range(4):
        state, report = trainer.dispatch(state, [next(batches)])
        jax.block_until_ready((state, report))
        seconds.append(time.perf_counter() - started)
        losses.append(float(np.asarray(report["loss"])[0]))
        started = time.perf_counter()
    times = {"first": seconds[0], "later": min(seconds[1:])}
    return times | {"held": held, "peak": peak_gib(), "loss": losses[2]}


def peak_gib() -> float:
    """The peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Runs the command line."""
    options = parser("benchmarks.memory", __doc__)
    text = f"configs to measure (default: {len(CONFIGS)} of them)"
    options.add_argument("--configs", nargs="+", default=CONFIGS, help=text)
    options.add_argument("--one", help=SUPPRESS)
    args = options.parse_args()
    if args.one:
        print(json.dumps(first_updates(args.one)))
        return
    times, sizes = ("first update, s", "later update, s"), ("peak, GiB", "beyond the state, GiB")
    print_head("config", *times, *sizes, "loss")
    for spec in args.configs:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", spec]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        seconds = (f"{found['first']:.1f}", f"{found['later']:.3f}")
        memory = (f"{found['peak']:.2f}", f"{found['peak'] - found['held']:.2f}")
        print_row(spec.removeprefix("configs/"), *seconds, *memory, f"{found['loss']:.4f}")


if __name__ == "__main__":
    run(main)
