"""Training steps of deep ReZero MLPs: ours against PyTorch, pair by pair.

    python -m benchmarks.mlp --torch-python=.venv-torch/bin/python

where .venv-torch is an environment of its own:

    python3 -m venv .venv-torch && .venv-torch/bin/pip install -r benchmarks/requirements.txt

What is timed is the whole step. Ours is the step of train.py: it gathers the batch from uint8
images on the device, standardises, and applies the update, several steps a dispatch. PyTorch's is
handed float images and does zero_grad, forward, backward and Adagrad's step; "fused" is its Adagrad
with fused=True, the fastest it has on a CPU (a GPU has none), else the default one. The processes
take turns; a ratio above 1 says that ours is faster.

Also: the share of the machine's matrix-product rate, measured in the same turns; seconds from
nothing to the first finished update, and peak memory, by depth; the loop's overhead over the bare
jitted step. Run it on an otherwise idle machine.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.step import first_updates, peak_gib, serve_training
from benchmarks.worker import SHORTEST, milliseconds, serve, spread, take_turns
from rezero_jax.config import load_config
from rezero_jax.data import Dataset, ResidentSplit
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from rezero_jax.training.trainer import Trainer

CLASSES, EXAMPLES = 10, 10_000
PEERS = ("eager", "eager-fused", "compile", "compile-fused")


def random_images(
    shape: tuple[int, ...] = (32, 32, 3), classes: int = CLASSES, count: int = EXAMPLES
) -> Dataset:
    """Random images, of CIFAR-10's shape by default: speed does not depend on what they show."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = rng.integers(0, classes, count, np.int32)
    split = ResidentSplit({"image": images, "label": labels})
    half = (0.5,) * shape[-1]
    return Dataset("random", split, split, shape, classes, half, half)


def config_for(depth: int, width: int, batch: int, lr: float = 0.01) -> ConfigDict:
    """The config of configs/mlp.py at these sizes, endless and silent."""
    spec = f"configs/mlp.py:depth={depth},width={width},lr={lr},dataset=cifar10"
    fields = {
        "train.epochs": None,
        "train.steps": 10**6,
        "train.batch_size": batch,
        "eval.every_epochs": None,
    }
    return load_config(spec, [f"{key}={value}" for key, value in fields.items()])


def serve_ours(depth: int, width: int, batch: int) -> None:
    """Serves timings of our training step."""
    serve_training(config_for(depth, width, batch), random_images())


def serve_gemm(size: int) -> None:
    """Serves timings of a square float32 matrix product."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(jnp.matmul)

    def steps(count: int) -> None:
        for _ in range(count):
            product(a, a).block_until_ready()

    serve(steps)


def flops(depth: int, width: int, batch: int) -> int:
    """Floating-point operations of the matrix products of one training step."""
    stem, hidden, head = 3072 * width, depth * width**2, width * CLASSES
    # Forward, weight gradient and input gradient; the images need no gradient.
    return 2 * batch * (2 * stem + 3 * hidden + 3 * head)


def loop_overhead(depth: int, pairs: int) -> list[float]:
    """Seconds of a step in the loop of train.py over those of the bare step, pair by pair."""
    config = config_for(depth, 256, 100)
    config.train.steps = count = 400
    config.checkpoint.every_steps = config.train.steps
    dataset = random_images()
    trainer = Trainer(config, dataset)
    dispatch = config.train.steps_per_dispatch
    ratios = []
    for _ in range(pairs + 1):
        state, batches = trainer.init(), trainer.batches(0)
        state, _ = trainer.dispatch(state, list(islice(batches, dispatch)))
        jax.block_until_ready(state)
        started = time.perf_counter()
        for _ in range(count // dispatch - 1):
            state, report = trainer.dispatch(state, list(islice(batches, dispatch)))
        jax.block_until_ready((state, report))
        bare = (time.perf_counter() - started) / (count - dispatch)
        with tempfile.TemporaryDirectory() as folder:
            loop.train(config, folder, dataset)
            rates = [line["examples_per_second"] for line in read_metrics(folder)]
        in_loop = statistics.mean(100 / rate for rate in rates[1:])
        ratios.append(in_loop / bare)
    return ratios[1:]


def pairs_with_torch(
    python: str, modes: Sequence[str], depth: int, width: int, batch: int, pairs: int
) -> list[str]:
    """The rows of the table of one size."""
    sizes = [str(depth), str(width), str(batch)]
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.mlp", "--serve", *sizes],
        "gemm": [sys.executable, "-m", "benchmarks.mlp", "--serve-gemm", "2048"],
    }
    if depth >= 1000:  # compiling a thousand layers takes PyTorch too long to wait for
        modes = [mode for mode in modes if "compile" not in mode]
    commands |= {mode: [python, "-m", "benchmarks.torch_mlp", mode, *sizes] for mode in modes}
    times = take_turns(commands, pairs, 5 if depth >= 1000 else 20, SHORTEST)
    peak = [2 * 2048**3 / seconds for seconds in times["gemm"]]
    share = spread(
        [flops(depth, width, batch) / t / p for t, p in zip(times["ours"], peak, strict=True)]
    )
    size = f"{depth} x {width}, batch {batch}"
    return [
        f"| {size} | {mode} | {milliseconds(times['ours'])} | {milliseconds(times[mode])} | "
        + spread([b / a for a, b in zip(times["ours"], times[mode], strict=True)])
        + f" | {share} |"
        for mode in modes
    ]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", metavar="FILE", help="a Python that has PyTorch")
    parser.add_argument("--pairs", type=int, default=11, help="turns of each worker")
    parser.add_argument("--peers", nargs="*", default=PEERS, help="modes of PyTorch; also -graphs")
    parser.add_argument("--depths", type=int, nargs="*", default=[32, 64, 1000])
    parser.add_argument("--first-depths", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--overhead-depths", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--serve", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--serve-gemm", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_ours(*args.serve)
    if args.serve_gemm:
        return serve_gemm(args.serve_gemm)
    if args.first:
        found = first_updates(config_for(args.first, 150, 100, lr=0.003), random_images())
        print(json.dumps(found | {"peak_gib": peak_gib()}))
        return None

    if args.depths and not args.torch_python:
        parser.error("--torch-python is needed to time PyTorch; see --help, or give --depths alone")
    if args.depths:
        print("ms per step: median; ratios and share: median (range) over the turns\n")
        print("| size | PyTorch | ours, ms | PyTorch, ms | PyTorch / ours | share of GEMM rate |")
        print("| --- | --- | --- | --- | --- | --- |")
    for depth in args.depths:
        batch = 128 if depth == 32 else 100
        rows = pairs_with_torch(args.torch_python, args.peers, depth, 256, batch, args.pairs)
        print("\n".join(rows), flush=True)

    if args.first_depths:
        print("\n| depth, width 150 | first step, s | later step, s | peak memory, GiB |")
        print("| --- | --- | --- | --- |")
    for depth in args.first_depths:
        command = [sys.executable, "-m", "benchmarks.mlp", "--first", str(depth)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        print(
            f"| {depth:,} | {found['first']:.1f} | {found['later']:.3f} | {found['peak_gib']:.2f} |"
        )

    for depth in args.overhead_depths:
        with contextlib.redirect_stdout(io.StringIO()):
            ratios = loop_overhead(depth, 3)
        print(f"\nstep in the loop / bare step at depth {depth}: {spread(ratios)}")
    return None


if __name__ == "__main__":
    main()
