"""Times JAX programs on random data; see benchmarks/worker.py.

    python -m benchmarks.jax_worker PROGRAM SPEC

"ours" is the training step of train.py, which gathers the batch from data on the device, augments
and standardises images, and updates, in dispatches of several steps. "nnx" is the training step of
the baseline in idiomatic Flax NNX (rehearsal/baseline.py) on one given batch. "generation"
continues 16 bytes greedily, one sequence at a time; a step is a byte. "product" is a float32 matrix
product of size 2,048.

SPEC is a config as in --config of train.py, followed by fields in the same argument:
"configs/mlp.py:depth=64 train.batch_size=100".
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from benchmarks.worker import PROMPT, serve
from rehearsal.baseline_step import fitting_baseline
from rehearsal.estimate import chip_of, estimate, memory_of
from rehearsal.plan import compile_dispatch, updates_of
from rezero_jax.command import parser
from rezero_jax.config import load_config
from rezero_jax.data import Dataset, ResidentSplit, Text, TextSplit, load, stand_in
from rezero_jax.devices import cache_compilations, set_cpu_devices
from rezero_jax.errors import UserError
from rezero_jax.models.build import make_language_model
from rezero_jax.training.cost import model_flops, peak_flops, update_flops
from rezero_jax.training.trainer import Trainer

EXAMPLES, SIZE = 2560, 2048
Steps = Callable[[int], None]  # runs n steps and waits for the result
Program = tuple[Steps, dict[str, float]]  # with its costs, see benchmarks/updates.py


def endless(spec: str, **fields: Any) -> ConfigDict:
    """The config of a spec, for practically unlimited updates.

    Args:
      spec: the config, followed by fields.
      **fields: further fields, with "__" for the dot of their names.
    """
    name, *given = spec.split()
    more = {"train.epochs": None, "train.steps": 10**6}
    more |= {key.replace("__", "."): value for key, value in fields.items()}
    return load_config(name, [*given, *(f"{key}={value}" for key, value in more.items())])


def random_data(config: ConfigDict) -> Dataset | Text:
    """Random data in the shape of the data set that config.data names."""
    rng = np.random.default_rng(0)
    if config.model.name == "transformer":
        text, length = rng.integers(0, 256, 1_000_000, np.uint8), config.data.length
        return Text("random", TextSplit(text, length), TextSplit(text[:10_000], length, whole=True))
    named = stand_in(config.data) or load(config.data)
    assert isinstance(named, Dataset)
    shape, classes = named.example_shape, named.num_classes
    images = rng.integers(0, 256, (EXAMPLES, *shape), np.uint8)
    labels = rng.integers(0, classes, EXAMPLES, np.int32)
    split = ResidentSplit({"image": images, "label": labels})
    half = (0.5,) * shape[-1]
    return Dataset("random", split, split, shape, classes, half, half)


def predicted(compiled: jax.stages.Compiled, trainer: Trainer) -> dict[str, float]:
    """{"predicted": seconds of an update by rehearsal.estimate}; {} for unknown devices."""
    chip = chip_of(trainer.mesh.devices.flat[0])
    if chip is None:
        return {}
    flops = update_flops(trainer) / trainer.mesh.size
    return {"predicted": estimate(compiled).update.seconds(chip, flops)}


def ours(config: ConfigDict) -> Program:
    """Our training step."""
    trainer = Trainer(config, random_data(config))
    started = time.perf_counter()
    compiled = compile_dispatch(trainer)
    cost = {"compiled": time.perf_counter() - started, "memory": memory_of(compiled)}
    cost["flops"] = model_flops(trainer)
    cost |= predicted(compiled, trainer)
    if limit := (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"):
        cost["limit"] = limit
    if peak := peak_flops(trainer):
        cost["bound"] = cost["flops"] / peak
    return updates_of(trainer), cost


def baseline(config: ConfigDict) -> Program:
    """The training step of the baseline.

    Raises:
      NotImplementedError: the config has no baseline.
    """
    data, rng = random_data(config), np.random.default_rng(0)
    trainer, values = Trainer(config, data), getattr(data, "num_classes", 256)
    started = time.perf_counter()
    baseline, update = fitting_baseline(trainer)
    cost = {"compiled": time.perf_counter() - started, "memory": memory_of(update)}
    cost |= predicted(update, trainer)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        whole = np.issubdtype(leaf.dtype, np.integer)
        drawn = rng.integers(values, size=leaf.shape) if whole else rng.normal(size=leaf.shape)
        return jax.device_put(jnp.asarray(drawn, leaf.dtype), leaf.sharding)

    state, batch = baseline.init(), jax.tree.map(draw, baseline.batch)

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, loss = update(state, batch)
        jax.block_until_ready((state, loss))

    return steps, cost


def generation(config: ConfigDict) -> Program:
    """Greedy generation, including the prefill of the prompt."""
    model = jax.jit(lambda: make_language_model(config.model)(nnx.Rngs(0)))()
    prompt = np.arange(PROMPT)[None]

    def steps(count: int) -> None:
        jax.block_until_ready(model.generate(prompt, count, temperature=0))

    steps(config.data.length - PROMPT)  # each count is compiled; benchmarks.updates asks for this
    return steps, {}


def product(config: ConfigDict) -> Program:
    """A square float32 matrix product."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, SIZE)), jnp.float32)
    multiply = jax.jit(jnp.matmul)

    def steps(count: int) -> None:
        for _ in range(count):
            multiply(a, a).block_until_ready()

    return steps, {"flops": 2 * SIZE**3}


PROGRAMS = {"ours": ours, "nnx": baseline, "generation": generation, "product": product}


def main(argv: list[str]) -> None:
    """Runs the command line."""
    options = parser("benchmarks.jax_worker", __doc__)
    options.add_argument("program", choices=PROGRAMS)
    options.add_argument("spec", metavar="SPEC")
    args = options.parse_args(argv)
    config = endless(args.spec)
    if config.mesh.cpu_devices is not None and args.program != "product":
        set_cpu_devices(config.mesh.cpu_devices)
    cache_compilations()
    try:
        steps, cost = PROGRAMS[args.program](config)
    except (UserError, NotImplementedError) as error:
        sys.exit(f"{args.program} of {args.spec}: {error}")
    serve(steps, cost)


if __name__ == "__main__":
    main(sys.argv[1:])
