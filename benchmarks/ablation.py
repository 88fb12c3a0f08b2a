"""What each of our measures gains in the training step of a CIFAR ResNet.

    python -m benchmarks.ablation

Builds the step up from a plain version with nnx.BatchNorm, jax.grad of the plain convolution, one
device and one update a dispatch. The first two rows are a step as an example would have it, handed
float images; the rows after them are the whole step of train.py, augmentation included. All rows
are timed in turns; a ratio above 1 says that the default is faster. Run it on an otherwise idle
machine.
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

from benchmarks.jax_worker import endless, random_data, updates_of
from benchmarks.worker import SHORTEST, milliseconds, serve, spread, take_turns
from rezero_jax.devices import set_cpu_devices
from rezero_jax.models.resnet import blocks, conv
from rezero_jax.models.resnet.model import ResNet
from rezero_jax.stack import split_params
from rezero_jax.training.state import model_spec
from rezero_jax.training.trainer import Trainer

BATCH = 128
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


def serve_stage(depth: int, stage: str) -> None:
    """Serves timings of the training step with all of STAGES up to `stage`."""
    used = list(STAGES)[: list(STAGES).index(stage) + 1]
    if "batch_norm" not in used:
        blocks.BatchNorm = FlaxBatchNorm  # type: ignore[assignment,misc]
    if "gradients" not in used:
        conv._convolve = conv._plain  # type: ignore[assignment]
        return serve(plain_steps(depth))
    if "pairs" not in used:
        conv._has_pairs = lambda *_: False
    config = endless(f"configs/resnet.py:depth={depth}")
    if "devices" in used:
        set_cpu_devices(config.mesh.cpu_devices)
    return serve(updates_of(Trainer(config, random_data(config))))


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


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=11, help="turns of each row (default: 11)")
    parser.add_argument("--depth", type=int, default=20, help="number of layers (default: 20)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return serve_stage(args.depth, args.stage)
    command = [sys.executable, "-m", "benchmarks.ablation", f"--depth={args.depth}"]
    commands = {STAGES[stage]: [*command, f"--stage={stage}"] for stage in reversed(STAGES)}
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
