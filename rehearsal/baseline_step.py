"""The training step of the baselines in idiomatic Flax NNX, compiled for any devices.

The step uses `nnx.value_and_grad`, `nnx.Optimizer` with an optax optimizer, and one jitted update
with a donated state and a sharded batch. The optimizer, its constants and gradient accumulation are
those of our config. The baseline does less work than our step: pixels are float32, already
standardised and augmented; no gradient norm is reported; every parameter has one constant learning
rate, and LAMB has one trust ratio for all layers of a stack.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rehearsal.baseline import make_model
from rehearsal.estimate import memory_of
from rezero_jax.devices import gpu_memory
from rezero_jax.training.sharding import FULLY_SHARDED_FROM
from rezero_jax.training.trainer import Trainer

Batch = tuple[Array, Array]  # inputs and integer targets
State = nnx.State
Update = Callable[[State, Batch], tuple[State, Array]]


def make_optimizer(optim: ConfigDict) -> optax.GradientTransformation:
    """The optax optimizer of config.optim, at a constant learning rate."""
    rate, decay, moments = optim.learning_rate, optim.weight_decay, (optim.b1, optim.b2)
    match optim.name:
        case "adagrad":
            optimizer = optax.adagrad(rate, initial_accumulator_value=0.0)
        case "sgd":
            optimizer = optax.sgd(rate, optim.momentum, optim.nesterov)
            if decay:
                optimizer = optax.chain(optax.add_decayed_weights(decay), optimizer)
        case "adamw":
            optimizer = optax.adamw(rate, *moments, weight_decay=decay)
        case "lamb":
            optimizer = optax.lamb(rate, *moments, weight_decay=decay)
        case other:
            raise NotImplementedError(f"the baselines have no optimizer {other}")
    if optim.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), optimizer)


def make_update(
    make: Callable[[], nnx.Module], optim: ConfigDict, accumulate: int = 1
) -> tuple[Callable[[], State], Update]:
    """Returns init() -> state and update(state, batch) -> (state, loss), neither jitted.

    Args:
      make: makes the model.
      optim: config.optim.
      accumulate: number of microbatches per batch.
    """

    def create() -> tuple[nnx.Module, nnx.Optimizer]:
        model = make()
        return model, nnx.Optimizer(model, make_optimizer(optim), wrt=nnx.Param)

    graphdef, _ = nnx.split(nnx.eval_shape(create))

    def loss(model: Any, batch: Batch) -> Array:
        logits = model(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def gradients(model: Any, batch: Batch) -> tuple[Array, Any]:
        if accumulate == 1:
            return nnx.value_and_grad(loss)(model, batch)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def add(carry: Any, microbatch: Batch) -> Any:
            model, sums = carry
            found = nnx.value_and_grad(loss)(model, microbatch)
            return model, jax.tree.map(jnp.add, sums, found)

        # Microbatch j has every accumulate-th example, so that no example changes its device.
        split = jax.tree.map(
            lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch
        )
        params = nnx.state(model, nnx.Param)
        _, sums = add((model, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))), split)
        return jax.tree.map(lambda leaf: leaf / accumulate, sums)

    def update(state: State, batch: Batch) -> tuple[State, Array]:
        model, optimizer = nnx.merge(graphdef, state)
        value, grads = gradients(model, batch)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value

    return lambda: nnx.state(create()), update


class Baseline:
    """The baseline of `config` on these devices, which may be absent.

    Attributes:
      batch: shapes, dtypes and shardings of the inputs and targets.

    Args:
      config: a config of train.py.
      devices: devices to shard the batch over and, with config.mesh.fully_sharded, the state.
      dataset: data set whose sizes an image model takes; None for a language model, which reads
        config.data.length bytes.
      microbatches: number of microbatches per batch.
    """

    def __init__(
        self, config: ConfigDict, devices: Sequence[Any], dataset: Any, microbatches: int = 1
    ):
        example = getattr(dataset, "example_shape", ())
        classes = getattr(dataset, "num_classes", 0)
        mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
        make = partial(make_model, config.model, example, classes, config.seed)
        init, update = make_update(make, config.optim, microbatches)

        def place(path: Any, leaf: Any) -> Any:
            spec: list[str | None] = [None] * leaf.ndim
            layers = "blocks" in jax.tree_util.keystr(path) and config.model.name != "resnet"
            axes = [i for i in range(layers, leaf.ndim) if leaf.shape[i] % mesh.size == 0]
            if config.mesh.fully_sharded and leaf.size >= FULLY_SHARDED_FROM and axes:
                spec[max(axes, key=lambda i: leaf.shape[i])] = "data"
            return leaf.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

        self._mesh = mesh
        self._state = jax.tree.map_with_path(place, jax.eval_shape(init))
        places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        self._init = jax.jit(init, out_shardings=places)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=(places, None))
        rows, text = config.train.batch_size, config.model.name == "transformer"
        images = ((rows, *example), jnp.float32)
        inputs = ((rows, config.data.length), jnp.int32) if text else images
        targets = inputs if text else ((rows,), jnp.int32)
        sharded = NamedSharding(mesh, PartitionSpec("data"))
        self.batch = tuple(jax.ShapeDtypeStruct(*a, sharding=sharded) for a in (inputs, targets))

    def compile(self) -> jax.stages.Compiled:
        """The compiled update: maps a donated state and a batch to the next state and the loss."""
        with jax.set_mesh(self._mesh):
            return self._update.lower(self._state, self.batch).compile()

    def init(self) -> State:
        """The initial state."""
        with jax.set_mesh(self._mesh):
            return self._init()


def fitting_baseline(trainer: Trainer) -> tuple[Baseline, jax.stages.Compiled]:
    """The baseline of our trainer, and its compiled update.

    It has the fewest microbatches, but at least ours, that fit in the memory of a known GPU.
    """
    devices = list(trainer.mesh.devices.flat)
    memory = gpu_memory(devices[0].device_kind) or math.inf
    rows = trainer.config.train.batch_size // len(devices)
    count = trainer.microbatches
    while True:
        baseline = Baseline(trainer.config, devices, trainer.dataset, count)
        compiled = baseline.compile()
        if memory_of(compiled) <= memory or count >= rows:
            return baseline, compiled
        count = next(n for n in range(count + 1, rows + 1) if rows % n == 0)
