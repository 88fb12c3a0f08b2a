"""Overhead of the loop of train.py over bare updates, and cost of saving a checkpoint.

    python -m benchmarks.loop

The first table compares a step within the loop (metrics, checkpoints, progress) with the bare
jitted step, for MLPs of width 256, in turns.

The second table saves the state of a Transformer with 200 million parameters between updates, as
train.py does: 16 layers of width 1024 with AdamW, 2.4 GB in float32. "blocked" is the duration of
the call that saves, including the fingerprint of the arrays. "next update" runs while the
checkpoint is being written. "durable" ends when the checkpoint is on disk. The numbers are medians,
with the range in brackets.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks.jax_worker import endless, random_data
from benchmarks.worker import print_head, print_row, spread
from rehearsal.plan import updates_of
from rezero_jax.command import parser, run
from rezero_jax.config import base_config
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.runs.restore import fingerprint
from rezero_jax.training import loop
from rezero_jax.training.trainer import Trainer


def loop_over_bare(depth: int, turns: int, count: int = 400) -> list[float]:
    """The time of a step in the loop of train.py, divided by that of the bare step, by turn."""
    spec = f"configs/mlp.py:depth={depth},width=256,dataset=cifar10 eval.every_epochs=None"
    config = endless(spec, train__steps=count, checkpoint__every_steps=count)
    dataset, per_dispatch = random_data(config), config.train.steps_per_dispatch
    trainer, ratios = Trainer(config, dataset), []
    for _ in range(turns + 1):
        bare = updates_of(trainer)
        bare(per_dispatch)
        started = time.perf_counter()
        bare(count - per_dispatch)
        seconds = (time.perf_counter() - started) / (count - per_dispatch)
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, tempfile.TemporaryDirectory() as folder:
            loop.train(config, folder, dataset)
            rates = [line["examples_per_second"] for line in read_metrics(folder)]
        in_loop = statistics.mean(config.train.batch_size / rate for rate in rates[1:])
        ratios.append(in_loop / seconds)
    return ratios[1:]  # the first turn compiles


def saves(trainer: Trainer, count: int, folder: Path) -> dict[str, list[float]]:
    """Durations in seconds of each stage of a save, for each of `count` saves."""
    batches, state = trainer.batches(0), trainer.init()
    checkpoints = Checkpoints(folder, base_config().checkpoint)
    seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    def update() -> None:
        nonlocal state
        state, _ = trainer.dispatch(state, [next(batches)])
        jax.block_until_ready(state)

    update()  # compiles
    fingerprint(state)
    for step in range(1, count + 1):
        update()  # warms up after the last save
        with timed("update"):
            update()
        with timed("fingerprint"):
            fingerprint(state)
        with timed("durable"):
            with timed("blocked"):
                checkpoints.save(step, state, {}, None)
            with timed("next update"):
                update()
            checkpoints.finish()
    checkpoints.close()
    return seconds


def main() -> None:
    """Runs the command line."""
    options = parser("benchmarks.loop", __doc__)
    for name, default, text in (
        ("--turns", 3, "timings per MLP"),
        ("--depth", 16, "layers of the Transformer"),
        ("--width", 1024, "width of the Transformer"),
        ("--batch", 4, "number of sequences of 128 bytes in the Transformer's batch"),
        ("--saves", 3, "number of saves to time; 0 skips them"),
    ):
        help_text = f"{text} (default: {default})"
        options.add_argument(name, type=int, default=default, help=help_text)
    text = "depths of the MLPs (default: 32 and 64)"
    options.add_argument("--mlp-depths", type=int, nargs="*", default=[32, 64], help=text)
    args = options.parse_args()
    if args.mlp_depths:
        print_head("MLP", "step in the loop / bare step")
    for depth in args.mlp_depths:
        print_row(f"{depth} x 256", spread(loop_over_bare(depth, args.turns)))
    if not args.saves:
        return
    spec = f"configs/transformer_small.py:depth={args.depth},width={args.width},length=128"
    fields = {"model__scan": True, "mesh__cpu_devices": None, "train__steps_per_dispatch": 1}
    config = endless(spec, train__batch_size=args.batch, **fields)
    trainer = Trainer(config, random_data(config))
    with tempfile.TemporaryDirectory() as folder:
        seconds = saves(trainer, args.saves, Path(folder) / "checkpoints")
    every = base_config().checkpoint.every_steps
    parameters = trainer.spec.parameter_count / 1e6
    print(f"\n{parameters:,.0f} million parameters, a save every {every:,} updates\n")
    print_head("", "seconds", "share of an update", "share of the time between saves")
    update = statistics.median(seconds["update"])
    for name, values in seconds.items():
        median = statistics.median(values)
        shares = (f"{median / update:.1%}", f"{median / (update * every):.4%}")
        print_row(name, spread(values), *shares)


if __name__ == "__main__":
    run(main)
