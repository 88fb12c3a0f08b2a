"""How long a save keeps the training waiting, at 200 million parameters.

    python -m benchmarks.checkpoint

The state of a Transformer of 16 layers of width 1024 with AdamW (parameters and two moments, 2.4 GB
in float32) is saved between updates, as train.py does. "blocked" is how long the call that saves
takes, of which the fingerprint of the arrays is a part; "next update" is the one made while the
checkpoint is being written; "durable" is when it is on disk. Medians, and the range in brackets.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.transformer import random_text
from benchmarks.worker import spread
from rezero_jax.config import base_config, load_config
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.restore import fingerprint
from rezero_jax.training.trainer import Trainer

LENGTH = 128  # bytes of a sequence


def measure(
    depth: int, width: int, batch: int, saves: int, folder: Path
) -> tuple[int, dict[str, list[float]]]:
    """The number of parameters, and what each part took at every save, in seconds."""
    fields = {
        "model.depth": depth,
        "model.width": width,
        "model.scan": True,
        "mesh.cpu_devices": None,
        "train.steps": 3 * saves + 1,
        "train.steps_per_dispatch": 1,
        "train.batch_size": batch,
    }
    spec = f"configs/transformer_small.py:length={LENGTH}"
    config = load_config(spec, [f"{key}={value}" for key, value in fields.items()])
    trainer = Trainer(config, random_text(LENGTH))
    batches = trainer.batches(0)
    state = trainer.init()
    state, _ = trainer.dispatch(state, [next(batches)])  # compiles
    fingerprint(state)
    checkpoints = Checkpoints(folder, base_config().checkpoint)
    names = ("update", "fingerprint", "blocked", "next update", "durable")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(1, saves + 1):
        state, _ = trainer.dispatch(state, [next(batches)])
        jax.block_until_ready(state)  # the first update after a save still pays for it
        began = time.perf_counter()
        state, _ = trainer.dispatch(state, [next(batches)])
        jax.block_until_ready(state)
        seconds["update"].append(time.perf_counter() - began)
        began = time.perf_counter()
        fingerprint(state)
        seconds["fingerprint"].append(time.perf_counter() - began)
        began = time.perf_counter()
        checkpoints.save(step, state, {}, None)
        saved = time.perf_counter()
        seconds["blocked"].append(saved - began)
        state, _ = trainer.dispatch(state, [next(batches)])
        jax.block_until_ready(state)
        seconds["next update"].append(time.perf_counter() - saved)
        checkpoints.wait()
        seconds["durable"].append(time.perf_counter() - began)
    checkpoints.close()
    return trainer.spec.parameter_count, seconds


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 128 bytes")
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters, seconds = measure(
            args.depth, args.width, args.batch, args.saves, Path(folder) / "checkpoints"
        )
    every = base_config().checkpoint.every_steps
    print(f"{parameters / 1e6:,.0f} million parameters, a save every {every:,} updates")
    print("| | seconds | share of an update | share of the time between saves |")
    print("| --- | --- | --- | --- |")
    update = statistics.median(seconds["update"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"| {name} | {spread(values)} | "
            f"{median / update:.1%} | {median / (update * every):.4%} |"
        )


if __name__ == "__main__":
    main()
