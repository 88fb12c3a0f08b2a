"""The training state, one plain pytree of arrays, and its relation to a Flax module."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.residual import Alpha, Constant, Rule, StreamWeight
from rezero_jax.stack import Stack, split_params

# {"step": int32 (), "params": nested dict, "stats": nested dict, "opt_state": optax's tree}.
State = dict[str, Any]
MakeModel = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Metadata of one parameter, read by optimizers and sharding; no array.

    Attributes:
      is_gate: whether the parameter is an `Alpha`.
      is_stream_weight: whether a rule of several streams mixes the streams by the parameter.
      is_stacked: whether the leading axis runs over the layers of a scanned stack.
      rate: factor of the learning rate, declared as nnx.Param(value, rate=0.1).
      epsilon_scale: factor of Adam's epsilon, an attribute of the layer's residual rule.
      rate_scale: factor of the rate of every optimizer except SGD, an attribute of the same rule.
      model_axis: axis, counted from the end, that is sharded along the mesh axis `model`, or None;
        declared as nnx.Param(value, model_axis=-1), in a layer of Flax by `kernel_metadata`.
      matrix_axes: input and output axes, counted from the end, of a matrix of the submodule that
        holds the stacks: a kernel of a linear layer, or nnx.Param(value, matrix_axes=...).
    """

    is_gate: bool
    is_stream_weight: bool
    is_stacked: bool
    rate: float
    epsilon_scale: float
    rate_scale: float
    model_axis: int | None
    matrix_axes: tuple[tuple[int, ...], tuple[int, ...]] | None


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about a model except its arrays.

    Attributes:
      graphdef: the module's structure.
      shapes: the parameters' shapes and dtypes, a nested dict.
      parameters: path "a/b/c" -> the parameter's metadata.
      has_stats: whether training changes arrays other than the parameters, such as BatchNorm's
        running statistics.
    """

    graphdef: nnx.GraphDef
    shapes: Any
    parameters: Mapping[str, Parameter]
    has_stats: bool

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
        return jnp.concatenate(values) if values else jnp.zeros((0,))


def model_spec(make_model: MakeModel) -> ModelSpec:
    """The spec of the model that `make_model(rngs)` returns; computes no array."""
    model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    graphdef, params, stats = split_params(model)
    for path, variable in nnx.to_flat_state(stats):
        if isinstance(variable, nnx.RngState):
            raise UserError(
                f"the model keeps random keys ({'.'.join(map(str, path))}), but all randomness is "
                "a function of the seed and the step; make dropout without rngs=, and give it the "
                "rngs of each call"
            )
    stacks = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Stack)}
    rules = {  # of the layers of each stack; the base class scales nothing
        path: next((m for _, m in nnx.iter_modules(stack) if isinstance(m, Rule)), Rule)
        for path, stack in stacks.items()
    }

    def metadata(path: tuple[Any, ...], variable: nnx.Variable) -> Parameter:
        inside = [p for p in stacks if path[: len(p) + 1] == (*p, "blocks")]
        is_stacked = any(not isinstance(stacks[p].blocks, nnx.List) for p in inside)
        rule = rules[inside[-1]] if inside else Rule
        is_linear = path[-1] == "kernel" and variable.ndim - is_stacked == 2
        is_in_trunk = any(path[: len(p[:1])] == p[:1] for p in stacks)
        matrix_axes = variable.get_metadata("matrix_axes", ((-2,), (-1,)) if is_linear else None)
        return Parameter(
            is_gate=isinstance(variable, Alpha),
            is_stream_weight=isinstance(variable, StreamWeight),
            is_stacked=is_stacked,
            rate=variable.get_metadata("rate", 1.0),
            epsilon_scale=rule.epsilon_scale,
            rate_scale=rule.rate_scale,
            model_axis=variable.get_metadata("model_axis", None),
            matrix_axes=matrix_axes if is_in_trunk else None,
        )

    return ModelSpec(
        graphdef,
        shapes=nnx.to_pure_dict(params),
        parameters={
            "/".join(map(str, path)): metadata(path, variable)
            for path, variable in nnx.to_flat_state(params)
        },
        has_stats=any(not isinstance(v, Constant) for _, v in nnx.to_flat_state(stats)),
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


def one_per_layer(gates: Array) -> Array:
    """Gates (layers, ...) as one number per layer: the gate, or the mean |alpha| of several."""
    gates = gates.reshape(len(gates), -1)
    return gates[:, 0] if gates.shape[1] == 1 else jnp.abs(gates).mean(axis=1)
