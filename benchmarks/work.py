"""What one device does in a training step of a language model: counted, nothing computed."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from rezero_jax.models.build import make_language_model
from rezero_jax.training import cost, sharding, step
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import Skeleton, init_state, path_text, skeleton


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a mesh is used: its axes, and whether the state is spread over `data`."""

    data: int
    model: int = 1
    fully_sharded: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """The step of a config on one device that has `batch` examples to itself.

    Attributes:
      config: a whole config; its mesh and batch size are not looked at.
      batch: examples of one device in a step.
      skeleton, shapes: of the model, and of the training state.
      flops: operations of the matrix products, recomputation included.
      traffic: bytes that the matrix products and the optimizer move from and to memory.
      kept: remat -> bytes of activations that the backward pass finds.
    """

    config: ConfigDict
    batch: int
    skeleton: Skeleton
    shapes: Any
    flops: int
    traffic: int
    kept: dict[str, int]

    @classmethod
    def of(cls, config: ConfigDict, batch: int) -> "Work":
        """Counts the step of `config`, with the attention that an accelerator would compute."""
        make = make_language_model(config.model)
        model = skeleton(make)
        optimizer, _ = make_optimizer(config.optim, 1, model)
        shapes = jax.eval_shape(partial(init_state, make, optimizer), jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((batch, config.data.length), jnp.int32)
        args = shapes["params"], shapes["stats"], {"tokens": tokens, "targets": tokens}
        # On a CPU causal attention is cut into blocks; elsewhere whole squares are computed.
        with mock.patch.object(jax, "default_backend", return_value="tpu"):
            gradient = jax.grad(_loss(config.model))
            return cls(
                config,
                batch,
                model,
                shapes,
                flops=cost.flops(gradient, *args),
                traffic=cost.traffic(gradient, *args) + _optimizer_traffic(shapes),
                kept={remat: _kept(config.model, remat, *args) for remat in ("none", "full")},
            )

    @property
    def depth(self) -> int:
        """Layers."""
        return self.config.model.depth

    @property
    def bytes_per_element(self) -> int:
        """Of the dtype that the layers compute in."""
        return jnp.dtype(self.config.model.dtype).itemsize

    def specs(self, layout: Layout) -> dict[str, tuple[tuple[int, ...], frozenset[str]]]:
        """Parameter -> its shape on one device along `model`, and the mesh axes that cut it."""
        found = {}
        for path, leaf in jax.tree.leaves_with_path(self._placed(layout)["params"]):
            cut = frozenset(axis for axis in leaf.sharding.spec if axis)
            whole_along_data = [
                size // (layout.model if axis == "model" else 1)
                for size, axis in zip(leaf.shape, leaf.sharding.spec, strict=True)
            ]
            found[path_text(path)] = tuple(whole_along_data), cut
        return found

    def state_bytes(self, layout: Layout) -> dict[str, int]:
        """Bytes on one device of "params" and "opt_state"."""
        placed = self._placed(layout)
        return {name: sharding.device_bytes(placed[name]) for name in ("params", "opt_state")}

    def activation_bytes(self, layout: Layout, remat: str) -> int:
        """Bytes of activations on one device at the height of the backward pass.

        With remat="full" each layer's input, and all of one layer at a time. Tensor parallelism
        keeps the inputs of `model` times as many examples, whole, and its share of the rest.
        """
        if remat == "none":
            return self.kept["none"]
        return layout.model * self.kept["full"] + self.kept["none"] // self.depth

    def _placed(self, layout: Layout) -> Any:
        sizes = (layout.data, layout.model)
        mesh = AbstractMesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        places = sharding.state_shardings(
            self.shapes,
            mesh,  # type: ignore[arg-type]  # it says all that is asked of a mesh of devices
            self.skeleton.stacked_paths,
            layout.fully_sharded,
        )
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.shapes,
            places,
        )


def _loss(model: ConfigDict) -> Callable[..., jax.Array]:
    """loss(params, stats, data) of the model that config.model describes."""
    structure = skeleton(make_language_model(model))

    def loss(params: Any, stats: Any, data: step.Batch) -> jax.Array:
        network = structure.model(params, stats)
        return step.language_modelling(network, data, jax.random.key(0))["loss"].mean()

    return loss


def _optimizer_traffic(shapes: Any) -> int:
    """Bytes: parameters and the optimizer's state are read and written, gradients are read."""
    params, moments = (_bytes(shapes[name]) for name in ("params", "opt_state"))
    return 2 * (params + moments) + params


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _kept(model: ConfigDict, remat: str, params: Any, *rest: Any) -> int:
    """Bytes that the forward pass hands to the backward pass, the parameters excepted."""
    model = ConfigDict(model.to_dict() | {"remat": remat})
    loss = _loss(model)

    def handed(params: Any, *rest: Any) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, *rest), params)[1])

    jaxpr = jax.make_jaxpr(handed)(params, *rest).jaxpr
    arrays = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)} - set(jaxpr.invars)
    return sum(v.aval.size * v.aval.dtype.itemsize for v in arrays)
