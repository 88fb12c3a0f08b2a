"""Training steps and generation of byte-level Transformers: ours against PyTorch, pair by pair.

    python -m benchmarks.transformer --torch-python=.venv-torch/bin/python

where .venv-torch is the environment of `python -m benchmarks.mlp --help`.

12 layers of width 256, four times wider feed-forward, 8 heads, 256 bytes, GELU by erf, no dropout,
AdamW, batches of 8, or other sizes by the options. Ours is the ReZero network and the whole step of
train.py: it gathers the batch from the text on the device. The peers
(benchmarks/torch_transformer.py) are handed their tokens: `official` is made of the authors' own
ReZero layers, `x-transformers` is that package's pre-norm decoder, `flash` its attention by
PyTorch's fused kernel; `compile` is torch.compile, `graphs` its CUDA graphs, `fused` AdamW with
fused=True, not its default. On a GPU all compute in bfloat16. Generation continues 16 bytes by the
likeliest one, a sequence at a time; the official layers have no cache and read everything anew for
each byte.

The processes take turns; a ratio above 1 says that ours is faster. Also: seconds from nothing to
the first finished update, by depth. Run it on an otherwise idle machine.
"""

import argparse
import json
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from benchmarks.step import first_updates, serve_training
from benchmarks.worker import SHORTEST, print_ratios, serve, take_turns
from rezero_jax.config import load_config
from rezero_jax.data import Text, TextSplit
from rezero_jax.devices import set_cpu_devices
from rezero_jax.models.build import make_language_model

HEADS, PROMPT = 8, 16
TRAINING = ("official", "official-compile", "x-transformers", "x-transformers-flash")
GENERATION = ("official", "x-transformers", "x-transformers-flash")


class Sizes(NamedTuple):
    """Of a network and its batches of `batch` sequences of `length` bytes."""

    depth: int = 12
    width: int = 256
    length: int = 256
    batch: int = 8


def random_text(length: int) -> Text:
    """Random bytes in windows of `length`: speed does not depend on what they say."""
    text = np.random.default_rng(0).integers(0, 256, 1_000_000, np.uint8)
    return Text("random", TextSplit(text, length), TextSplit(text[:10_000], length, whole=True))


def config_for(sizes: Sizes, scan: bool) -> ConfigDict:
    """The config of configs/transformer_small.py at these sizes, endless and silent."""
    fields = {
        "model.heads": HEADS,
        "model.positions": "sinusoidal",
        "model.scan": scan,
        "train.steps": 10**6,
        "train.batch_size": sizes.batch,
        "eval.every_steps": None,
        "optim.schedule": "constant",
        "optim.clip_norm": None,
    }
    shape = f"depth={sizes.depth},width={sizes.width},length={sizes.length}"
    spec = f"configs/transformer_small.py:{shape}"
    config = load_config(spec, [f"{key}={value}" for key, value in fields.items()])
    set_cpu_devices(config.mesh.cpu_devices)
    return config


def serve_generation(sizes: Sizes) -> None:
    """Serves timings of bytes that continue a prompt, the reading of the prompt included."""
    config = config_for(sizes, scan=True)
    model = jax.jit(lambda: make_language_model(config.model)(nnx.Rngs(0)))()
    prompt = np.arange(PROMPT)[None]

    def steps(count: int) -> None:
        jax.block_until_ready(model.generate(prompt, count, temperature=0))

    steps(sizes.length - PROMPT)  # each count is compiled; the parent asks for this one
    serve(steps)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", metavar="FILE", help="a Python that has PyTorch")
    parser.add_argument("--turns", type=int, default=11, help="turns of each worker")
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", nargs="*", default=TRAINING, help="in training; also -fused")
    parser.add_argument("--generators", nargs="*", default=GENERATION, help="in generation")
    parser.add_argument("--first-depths", type=int, nargs="*", default=[12, 64, 128])
    parser.add_argument(
        "--serve", choices=("scanned", "unrolled", "generate"), help=argparse.SUPPRESS
    )
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = Sizes(args.depth, args.width, args.length, args.batch)
    if args.serve == "generate":
        return serve_generation(sizes)
    if args.serve:
        config = config_for(sizes, args.serve == "scanned")
        return serve_training(config, random_text(sizes.length))
    if args.first:
        config = config_for(sizes._replace(depth=args.first), scan=True)
        print(json.dumps(first_updates(config, random_text(sizes.length))))
        return None
    if not args.torch_python:
        parser.error("--torch-python is needed to time PyTorch; see --help")

    shape = [f"--{name}={value}" for name, value in sizes._asdict().items()]
    ours = [sys.executable, "-m", "benchmarks.transformer", *shape, "--serve"]
    peer = [args.torch_python, "-m", "benchmarks.torch_transformer"]
    of_peer = list(map(str, sizes))
    title = f"{sizes.depth} layers"
    if args.peers:
        print("| training | | ms a step, median | time over ours, median (range) |")
        print("| --- | --- | --- | --- |")
        commands = {"ours, unrolled": [*ours, "unrolled"], "ours, scanned": [*ours, "scanned"]}
        commands |= {name: [*peer, name, *of_peer] for name in args.peers}
        print_ratios(title, take_turns(commands, args.turns, 10, SHORTEST), "ours, unrolled")
    if args.generators:
        print("\n| generation | | ms a byte, median | time over ours, median (range) |")
        print("| --- | --- | --- | --- |")
        commands = {"ours": [*ours, "generate"]}
        commands |= {name: [*peer, "--generate", name, *of_peer[:3]] for name in args.generators}
        print_ratios(title, take_turns(commands, args.turns, sizes.length - PROMPT), "ours")
    if args.first_depths:
        print("\n| depth | first step, s | later step, s |\n| --- | --- | --- |")
    for depth in args.first_depths:
        command = [*ours[:-1], "--first", str(depth)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        print(f"| {depth} | {found['first']:.1f} | {found['later']:.2f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
