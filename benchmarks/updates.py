"""Compares updates of whole configs, and generation, with Flax NNX and PyTorch.

    python -m benchmarks.updates
    python -m benchmarks.updates --baselines eager compile --torch-python=.venv-torch/bin/python \\
        --configs "configs/mlp.py:depth=64,dataset=cifar10 train.batch_size=128"
    python -m benchmarks.updates --generate --baselines official x-transformers \\
        --torch-python=.venv-torch/bin/python --configs "configs/transformer_small.py:depth=12"

where .venv-torch is a separate environment:

    python3 -m venv .venv-torch && .venv-torch/bin/pip install -r benchmarks/requirements.txt

A config is as in --config of train.py, followed by fields. All programs of a config take turns on
random data, each in its own process (see benchmarks/jax_worker.py and benchmarks/torch_worker.py).
A baseline is "nnx", idiomatic Flax NNX, which does not support some configs; a field such as
"model.scan=True", ours with that field; or a mode of PyTorch, with a network of the config's sizes
on images of CIFAR-10's size or on bytes.

Ours is faster if a ratio exceeds 1. "bound" is the time of the model FLOPs at the peak rate of the
devices, and "MFU" the bound divided by our time; rematerialisation is excluded (arXiv 2204.02311,
B). If the peak is unknown, as on CPUs, --product substitutes the rate of a float32 matrix product,
timed in the same turns. "predicted" is the prediction for GPUs and the compiler's estimate for
TPUs, of the compiled program (rehearsal/estimate.py). "memory" is the compiler's allocation for the
program. Run the benchmark on an otherwise idle machine.
"""

import argparse
import math
import statistics
import sys

from benchmarks.jax_worker import endless
from benchmarks.worker import (
    PROMPT,
    SHORTEST,
    milliseconds,
    print_head,
    print_row,
    spread,
    take_turns,
)
from rezero_jax.command import parser, run
from rezero_jax.errors import UserError
from rezero_jax.formatting import number

ENWIK8 = "configs/transformer_enwik8.py:depth"
CONFIGS = (
    "configs/mlp.py:depth=64,dataset=cifar10",
    "configs/mlp.py:depth=10000,width=150,lr=0.003,dataset=cifar10",
    "configs/resnet.py:depth=56",
    f"{ENWIK8}=12",
    f"{ENWIK8}=12 model.dropout=0.0",
    f"{ENWIK8}=128",
    f"{ENWIK8}=128 model.dropout=0.0",
)
HEAD = (
    "config",
    "program",
    "ms a step, median",
    "predicted, ms",
    "time over ours, median (range)",
    "bound, ms",
    "MFU",
    "memory, GB",
    "compiled in, s",
)


def commands(spec: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """The commands of a config's workers, ours first."""
    config = endless(spec)
    jax = [sys.executable, "-m", "benchmarks.jax_worker"]
    found = {"ours": [*jax, "generation" if args.generate else "ours", spec]}
    if args.product:
        found["product"] = [*jax, "product", spec]
    network = "generation" if args.generate else config.model.name
    sizes = {name: config.model.get(name, 0) for name in ("depth", "width", "heads")}
    sizes |= {"length": config.data.length, "batch": config.train.batch_size}
    for name in args.baselines:
        if name == "nnx":
            found[name] = [*jax, "nnx", spec]
        elif "=" in name:
            found[name] = [*found["ours"][:-1], f"{spec} {name}"]
        elif args.torch_python is None:
            raise UserError(f"--baselines {name} needs PyTorch; give --torch-python, see --help")
        else:
            options = [f"--{key}={value}" for key, value in sizes.items()]
            worker = [args.torch_python, "-m", "benchmarks.torch_worker"]
            found[name] = [*worker, network, name, *options]
    return found


def rows(spec: str, args: argparse.Namespace, until: float = math.inf) -> list[list[str]]:
    """The rows of a config, with the columns of HEAD; `until` as in `take_turns`.

    Raises:
      UserError: the config is invalid, or a baseline needs PyTorch.
      RuntimeError: ours fails, or is too late.
    """
    if args.generate:
        count, shortest = endless(spec).data.length - PROMPT, 0.0
    else:
        count, shortest = args.steps, SHORTEST
    programs = commands(spec, args)
    times, costs = take_turns(programs, args.turns, count, shortest, until)
    config, cells = spec.removeprefix("configs/"), []
    for name in programs:
        if name not in times:
            cells.append([config, name, "failed or was too late", *[""] * (len(HEAD) - 3)])
            continue
        seconds = times[name]
        cost, ratios = costs[name], [b / a for a, b in zip(times["ours"], seconds, strict=True)]
        bounds = [cost["bound"]] * args.turns if "bound" in cost else []
        if name == "ours" and "product" in times:
            flops = cost["flops"] / costs["product"]["flops"]
            bounds = [flops * product for product in times["product"]]
        shares = [bound / t for bound, t in zip(bounds, seconds, strict=False)]
        cells.append(
            [
                config,
                name,
                milliseconds(seconds),
                milliseconds([cost["predicted"]]) if "predicted" in cost else "",
                "" if name in ("ours", "product") else spread(ratios),
                milliseconds(bounds) if bounds else "",
                f"{statistics.median(shares):.1%}" if shares else "",
                number(cost["memory"] / 1e9, 3) if "memory" in cost else "",
                number(cost["compiled"], 3) if "compiled" in cost else "",
            ]
        )
    return cells


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = parser("benchmarks.updates", __doc__)
    text = f"configs to time (default: {len(CONFIGS)} of them)"
    options.add_argument("--configs", nargs="+", default=CONFIGS, help=text)
    options.add_argument(
        "--baselines", nargs="*", default=["nnx"], help="programs to compare with (default: nnx)"
    )
    text = "Python interpreter with PyTorch, for its baselines (default: none)"
    options.add_argument("--torch-python", metavar="FILE", help=text)
    options.add_argument("--turns", type=int, default=7, help="timings per program (default: 7)")
    options.add_argument(
        "--steps", type=int, default=10, help="minimum steps per timing (default: 10)"
    )
    options.add_argument("--generate", action="store_true", help="time generation, byte by byte")
    options.add_argument("--product", action="store_true", help="also time a matrix product")
    args = options.parse_args(argv)
    print_head(*HEAD)
    failed = False
    for spec in args.configs:
        try:
            for row in rows(spec, args):
                print_row(*row)
        except (UserError, RuntimeError) as error:
            print(f"{spec}: {error}", file=sys.stderr, flush=True)
            failed = True
    return int(failed)


if __name__ == "__main__":
    run(main)
