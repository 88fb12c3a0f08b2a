"""Ablation of our optimizations in the training step of a CIFAR ResNet.

    python -m benchmarks.ablation

The first row is a step in idiomatic Flax NNX on one batch of float images and one device. Each
further row is the whole step of train.py, including augmentation, with one more optimization than
the row above. The rows are timed in turns; the default is faster if a ratio exceeds 1. Run the
benchmark on an otherwise idle machine.
"""

import sys
from collections.abc import Sequence

from benchmarks import jax_worker
from benchmarks.worker import SHORTEST, milliseconds, spread, take_turns
from rezero_jax.command import parser
from rezero_jax.models.resnet import conv

STAGES = {
    "nnx": "idiomatic Flax NNX: nnx.BatchNorm, plain convolutions",
    "gradients": "train.py: our BatchNorm and gradients of convolutions, 10 updates a dispatch",
    "pairs": "and 16 channels as pairs of pixels",
    "devices": "and a device for each core (the default)",
}


def serve_stage(depth: int, stage: str) -> None:
    """Serves timings of the training step with all of STAGES up to `stage`."""
    devices = "" if stage == "devices" else " mesh.cpu_devices=None"
    if stage == "gradients":
        conv._has_pairs = lambda *_: False
    program = "nnx" if stage == "nnx" else "ours"
    jax_worker.main([program, f"configs/resnet.py:depth={depth}{devices}"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = parser("benchmarks.ablation", __doc__)
    options.add_argument("--turns", type=int, default=11, help="timings per row (default: 11)")
    options.add_argument("--depth", type=int, default=20, help="number of layers (default: 20)")
    options.add_argument("--serve", choices=STAGES, help="time one row as a worker")
    args = options.parse_args(argv)
    if args.serve:
        return serve_stage(args.depth, args.serve)
    command = [sys.executable, "-m", "benchmarks.ablation", f"--depth={args.depth}"]
    commands = {STAGES[stage]: [*command, f"--serve={stage}"] for stage in reversed(STAGES)}
    times, _ = take_turns(commands, args.turns, 10, SHORTEST)
    default = times[STAGES["devices"]]
    print(f"| ResNet-{args.depth} | ms a step, median | time over the default, median (range) |")
    print("| --- | --- | --- |")
    for step, seconds in reversed(times.items()):
        ratios = [b / a for a, b in zip(default, seconds, strict=True)]
        print(f"| {step} | {milliseconds(seconds)} | {spread(ratios)} |")
    return None


if __name__ == "__main__":
    main()
