"""What recomputation and accumulation save: peak memory and time of a step at 1,000 layers.

    python -m benchmarks.memory

Each row is a process of its own, which makes three updates of a batch: a fully connected network of
width 256 on 1,000 images, and a Transformer of width 64 on 4 sequences of 128 bytes. `remat` is
model.remat and `parts` is train.accumulate; the losses of a network are the same in every row but
for rounding, as the last column shows. "beyond the state" leaves out what a process holds that
never updates: the compiled code, the data and the state (parameters and the optimizer's).
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import islice

import jax
import numpy as np

from benchmarks.mlp import random_images
from benchmarks.step import peak_gib
from benchmarks.transformer import random_text
from rezero_jax.config import load_config
from rezero_jax.training.trainer import Trainer

SIZES = {
    "mlp": ("configs/mlp.py:depth=1000,width=256", 1000, {}),
    "transformer": (
        "configs/transformer_small.py",
        4,
        {"model.depth": 1000, "model.width": 64, "model.heads": 4, "model.scan": True},
    ),
}
SETTINGS = [("none", 1), ("full", 1), ("none", 4), ("full", 4)]


def measure(name: str, remat: str, parts: int) -> dict[str, float]:
    """Peak memory (GiB) before and after three updates, seconds of the fastest, and the loss."""
    spec, batch, own = SIZES[name]
    fields = own | {
        "model.remat": remat,
        "mesh.cpu_devices": None,
        "train.epochs": None,
        "train.steps": 3,
        "train.steps_per_dispatch": 1,
        "train.batch_size": batch,
        "train.accumulate": parts,
        "eval.every_epochs": None,
        "eval.every_steps": None,
    }
    config = load_config(spec, [f"{key}={value}" for key, value in fields.items()])
    trainer = Trainer(config, random_images() if name == "mlp" else random_text(128))
    state = jax.block_until_ready(trainer.init())
    held = peak_gib()
    seconds = []
    for batch_ in islice(trainer.batches(0), 3):
        started = time.perf_counter()
        state, report = trainer.dispatch(state, [batch_])
        jax.block_until_ready((state, report))
        seconds.append(time.perf_counter() - started)
    loss = float(np.asarray(report["loss"])[0])
    return {"held": held, "peak": peak_gib(), "seconds": min(seconds), "loss": loss}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, remat, parts = args.one
        print(json.dumps(measure(name, remat, int(parts))))
        return
    print("| 1,000 layers | remat | parts | peak, GiB | beyond the state | a step, s | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in SIZES:
        for remat, parts in SETTINGS:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", name, remat, str(parts)]
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found = json.loads(run.stdout)
            print(
                f"| {name} | {remat} | {parts} | {found['peak']:.2f} | "
                f"{found['peak'] - found['held']:.2f} | {found['seconds']:.1f} | "
                f"{found['loss']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
