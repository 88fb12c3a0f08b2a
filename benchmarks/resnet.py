"""Training steps of CIFAR ResNets: ours against PyTorch, and what each of our means gains.

    python -m benchmarks.resnet --torch-python=.venv-torch/bin/python

where .venv-torch is the environment of `python -m benchmarks.mlp --help`.

Timed is the whole step, of the ReZero network with batches of 128 and SGD. Ours is the step of
train.py: it gathers the batch from uint8 images on the device, crops and flips, standardises, and
applies the update. PyTorch's is handed float images and does zero_grad, forward, backward and
SGD's step; `channels_last` is the memory format, `fused` its SGD with fused=True, not the default.
The processes take turns; a ratio above 1 says that ours is faster.

--ablation builds ours up from a plain version: nnx.BatchNorm, jax.grad of the plain convolution,
one device, one update a dispatch. Its first two rows are a step as an example would have it, handed
float images; those after it are the whole step of train.py, augmentation included. Run it on an
otherwise idle machine.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.mlp import random_images
from benchmarks.step import serve_training
from benchmarks.worker import SHORTEST, print_ratios, serve, take_turns
from rezero_jax.config import load_config
from rezero_jax.devices import set_cpu_devices
from rezero_jax.models.resnet import blocks, conv
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.stack import split_params
from rezero_jax.training.state import model_spec

BATCH = 128
PEERS = ("eager", "channels_last", "channels_last-fused", "compile", "compile-fused")
STAGES = {
    "plain": "a step by the book: nnx.BatchNorm, plain convolutions",
    "batch_norm": "with our BatchNorm",
    "gradients": "train.py: our gradients of convolutions, 10 updates a dispatch",
    "pairs": "and 16 channels as pairs of pixels",
    "devices": "and a device for each core (the default)",
}


class FlaxBatchNorm(nnx.BatchNorm):
    """Flax's own, with PyTorch's constants and our constructor (for rules without zero scales)."""

    def __init__(self, features: int, *, scale_init: float = 1.0):
        super().__init__(features, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))


def serve_ours(depth: int, scan: bool, stage: str) -> None:
    """Serves timings of our training step, with all of STAGES up to `stage`."""
    used = list(STAGES)[: list(STAGES).index(stage) + 1]
    if "batch_norm" not in used:
        blocks.BatchNorm = FlaxBatchNorm  # type: ignore[assignment,misc]
    if "gradients" not in used:
        conv._convolve = conv._plain  # type: ignore[assignment]
        serve(plain_steps(depth))
        return
    if "pairs" not in used:
        conv._has_pairs = lambda *_: False
    config = load_config(
        f"configs/resnet.py:depth={depth}",
        ["train.epochs=None", f"train.steps={10**6}", f"model.scan={scan}"],
    )
    if "devices" in used:
        set_cpu_devices(config.mesh.cpu_devices)
    serve_training(config, random_images())


def plain_steps(depth: int) -> Callable[[int], None]:
    """A step as an example would have it, on float images, one update a dispatch."""

    def make(rngs: nnx.Rngs) -> ResNet:
        return ResNet.cifar(depth, rngs=rngs)

    spec = model_spec(make)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    _, param_state, stat_state = split_params(jax.jit(lambda: make(nnx.Rngs(0)))())
    params, stats = nnx.to_pure_dict(param_state), nnx.to_pure_dict(stat_state)
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(BATCH, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, BATCH))

    def loss(params: Any, stats: Any) -> tuple[Any, Any]:
        model = spec.model(params, stats)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    @jax.jit
    def step(params: Any, stats: Any, opt_state: Any) -> tuple[Any, Any, Any]:
        grads, stats = jax.grad(loss, has_aux=True)(params, stats)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    def steps(count: int) -> None:
        nonlocal params, stats, opt_state
        for _ in range(count):
            params, stats, opt_state = step(params, stats, opt_state)
        jax.block_until_ready(params)

    return steps


def ours(depth: int, stage: str = "devices", scan: bool = False) -> list[str]:
    """The command of a worker."""
    return [sys.executable, "-m", "benchmarks.resnet", "--serve", str(depth), str(scan), stage]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", metavar="FILE", help="a Python that has PyTorch")
    parser.add_argument("--turns", type=int, default=11, help="turns of each worker")
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 56])
    parser.add_argument("--peers", nargs="*", default=PEERS, help="which of PyTorch's settings")
    parser.add_argument("--ablation", action="store_true", help="build ours up from a plain one")
    parser.add_argument("--scan", action="store_true", help="time scanned stages too")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        depth, scan, stage = args.serve
        serve_ours(int(depth), scan == "True", stage)
        return
    if not (args.torch_python or args.ablation or args.scan):
        parser.error("--torch-python is needed to time PyTorch; see --help")

    print("| network | | ms a step, median | time over ours, median (range) |")
    print("| --- | --- | --- | --- |")
    for depth in args.depths:
        commands = {"ours": ours(depth)}
        if args.torch_python:
            for mode in args.peers:
                peer = [args.torch_python, "-m", "benchmarks.torch_resnet", mode, str(depth)]
                commands[f"PyTorch {mode}"] = [*peer, str(BATCH)]
        if args.scan:
            commands["ours, stages scanned"] = ours(depth, scan=True)
        if args.ablation:
            commands |= {STAGES[stage]: ours(depth, stage) for stage in list(STAGES)[:-1]}
        print_ratios(f"ResNet-{depth}", take_turns(commands, args.turns, 10, SHORTEST), "ours")


if __name__ == "__main__":
    main()
