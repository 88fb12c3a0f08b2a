"""The training state, one plain pytree of arrays, and its relation to a Flax module."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.parameters import Parameter, parameters_of
from rezero_jax.residual import Constant
from rezero_jax.stack import split_params

# {"step": int32 (), "params": nested dict, "stats": nested dict, "opt_state": optax's tree}.
State = dict[str, Any]
MakeModel = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about a model except its arrays.

    Attributes:
      graphdef: the module's structure.
      shapes: the parameters' shapes and dtypes, a nested dict.
      parameters: path "a/b/c" -> the parameter's metadata.
      has_stats: whether training changes other arrays too, such as running statistics.
      gpu_compiler_options: XLA's options for the model on a GPU.
    """

    graphdef: nnx.GraphDef
    shapes: Any
    parameters: Mapping[str, Parameter]
    has_stats: bool
    gpu_compiler_options: Mapping[str, Any]

    @property
    def parameter_count(self) -> int:
        """Number of trainable numbers, gates included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

    def model(self, params: Any, stats: Any) -> nnx.Module:
        """The module with these arrays in it."""
        return nnx.merge(self.graphdef, params, stats)

    def alphas(self, params: Any) -> Array:
        """Every gate in the order of the layers, float32 (gates,).

        A gate per channel is represented by the mean of its absolute values. Where each sublayer
        has a gate, the gates of one layer are adjacent.
        """
        stacks: dict[str, list[Array]] = {}  # each (layers,); a gate outside a stack is alone
        for path, leaf in jax.tree.leaves_with_path(params):
            text = path_text(path)
            info = self.parameters[text]
            if info.is_gate:
                stack = text[: text.index("blocks/")] if info.is_stacked else text
                gates = one_per_layer(leaf if info.is_stacked else leaf[None])
                stacks.setdefault(stack, []).append(gates)
        values = [jnp.stack(gates, axis=1).reshape(-1) for gates in stacks.values()]
        return jnp.concatenate(values) if values else jnp.zeros((0,), jnp.float32)


def model_spec(make_model: MakeModel) -> ModelSpec:
    """The spec of the model that `make_model(rngs)` returns; computes no array."""
    with jax.enable_x64(False):
        model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    graphdef, params, stats = split_params(model)
    for path, variable in nnx.to_flat_state(stats):
        if isinstance(variable, nnx.RngState):
            raise UserError(
                f"the model keeps random keys ({'.'.join(map(str, path))}), but all randomness is "
                "a function of the seed and the step; make dropout without rngs=, and give it the "
                "rngs of each call"
            )
    return ModelSpec(
        graphdef,
        shapes=nnx.to_pure_dict(params),
        parameters={
            "/".join(map(str, path)): parameter for path, parameter in parameters_of(model).items()
        },
        has_stats=any(not isinstance(v, Constant) for _, v in nnx.to_flat_state(stats)),
        gpu_compiler_options=getattr(model, "gpu_compiler_options", {}),
    )


def init_state(make_model: MakeModel, optimizer: optax.GradientTransformation, key: Array) -> State:
    """The state before any update; to be jitted whole, so that arrays are born sharded."""
    _, param_state, stats = split_params(make_model(nnx.Rngs(key)))
    params = nnx.to_pure_dict(param_state)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "stats": nnx.to_pure_dict(stats),
        "opt_state": optimizer.init(params),
    }


def state_shapes(make_model: MakeModel, optimizer: optax.GradientTransformation) -> State:
    """Shapes and dtypes of `init_state`, which JAX_ENABLE_X64 does not change."""
    with jax.enable_x64(False):
        return jax.eval_shape(partial(init_state, make_model, optimizer), jax.random.key(0))


def one_per_layer(gates: Array) -> Array:
    """Gates (layers, ...) as one number per layer: the gate, or the mean |alpha| of several."""
    gates = gates.reshape(len(gates), -1)
    return gates[:, 0] if gates.shape[1] == 1 else jnp.abs(gates).mean(axis=1)
