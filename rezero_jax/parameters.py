"""The kind of each parameter, for optimizers: a gate, a matrix or a vector, of one layer or many.

Optax sees arrays without types, and in a scanned `Stack` every array has one axis more than in a
layer, so neither the type nor the number of axes of an array gives its kind.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

from rezero_jax.errors import UserError
from rezero_jax.residual import Alpha, Rule, StreamWeight
from rezero_jax.stack import Stack

Axes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Metadata of one parameter, read by optimizers and sharding; no array.

    Attributes:
      kind: "gate", an `Alpha` or a weight that mixes streams; else "matrix", two axes or more in
        one layer, which is not called a bias; else "vector".
      is_gate: whether the parameter is an `Alpha`.
      is_stacked: whether the leading axis runs over the layers of a scanned stack.
      rate: factor of the learning rate, declared as nnx.Param(value, rate=0.1).
      epsilon_scale: factor of Adam's epsilon, an attribute of the layer's residual rule.
      rate_scale: factor of the rate of every optimizer except SGD, an attribute of the same rule.
      model_axis: axis, counted from the end, that is sharded along the mesh axis `model`, or None;
        declared as nnx.Param(value, model_axis=-1), in a layer of Flax by `kernel_metadata`.
      matrix_axes: input and output axes, counted from the end, of a matrix of the submodule that
        holds the stacks: a kernel of a linear layer, or nnx.Param(value, matrix_axes=...).
    """

    kind: str
    is_gate: bool
    is_stacked: bool
    rate: float
    epsilon_scale: float
    rate_scale: float
    model_axis: int | None
    matrix_axes: Axes | None


def parameters_of(model: Any) -> dict[tuple[Any, ...], Parameter]:
    """The metadata of each parameter of a module, concrete or abstract, by its path."""
    stacks = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Stack)}
    rules = {  # of the layers of each stack; the base class scales nothing
        path: next((m for _, m in nnx.iter_modules(stack) if isinstance(m, Rule)), Rule)
        for path, stack in stacks.items()
    }

    def metadata(path: tuple[Any, ...], variable: nnx.Variable) -> Parameter:
        inside = [p for p in stacks if path[: len(p) + 1] == (*p, "blocks")]
        layer_axes = sum(not isinstance(stacks[p].blocks, nnx.List) for p in inside)
        rule = rules[inside[-1]] if inside else Rule
        ndim = variable.ndim - layer_axes
        is_matrix = ndim >= 2 and not str(path[-1]).endswith("bias")
        is_in_trunk = any(path[: len(p[:1])] == p[:1] for p in stacks)
        linear = ((-2,), (-1,)) if path[-1] == "kernel" and ndim == 2 else None
        matrix_axes = variable.get_metadata("matrix_axes", linear)
        is_gate = isinstance(variable, Alpha)
        mixes = is_gate or isinstance(variable, StreamWeight)
        return Parameter(
            kind="gate" if mixes else "matrix" if is_matrix else "vector",
            is_gate=is_gate,
            is_stacked=layer_axes > 0,
            rate=variable.get_metadata("rate", 1.0),
            epsilon_scale=rule.epsilon_scale,
            rate_scale=rule.rate_scale,
            model_axis=variable.get_metadata("model_axis", None),
            matrix_axes=matrix_axes if is_in_trunk else None,
        )

    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: metadata(path, variable) for path, variable in params}


def parameter_labels(model: Any) -> nnx.State:
    """The kind of each parameter, "gate", "matrix" or "vector", for `optax.partition`.

    Args:
      model: a module, concrete or abstract, that may hold modules of this package anywhere.

    Returns:
      A tree of the structure of `nnx.state(model, nnx.Param)`, which `nnx.Optimizer` takes;
      `nnx.to_pure_dict` makes a nested dict of it.

    Raises:
      UserError: `model` is not a module with parameters.

    Examples:
      >>> model = MLP(64, width=32, depth=4, out_features=10, rngs=nnx.Rngs(0))
      >>> kinds = {"gate": optax.sgd(0.01), "matrix": optax.adam(0.1), "vector": optax.adam(0.1)}
      >>> optimizer = optax.partition(kinds, parameter_labels(model))
    """
    return _mapped(model, lambda parameter: parameter.kind)


def decay_mask(model: Any) -> nnx.State:
    """Whether to decay each parameter: True for matrices; arguments are as in `parameter_labels`.

    Examples:
      >>> model = MLP(64, width=32, depth=4, out_features=10, rngs=nnx.Rngs(0))
      >>> adam = optax.adamw(1e-3, weight_decay=0.1, mask=decay_mask(model))
    """
    return _mapped(model, lambda parameter: parameter.kind == "matrix")


def muon_dimensions(model: Any) -> nnx.State:
    """The `muon_weight_dimension_numbers` of `optax.contrib.muon`, as in `parameter_labels`.

    Muon orthogonalises the matrices of the layers, one by one in a stack, and treats all other
    parameters, for which the value is None, by Adam. These include embeddings and the head.

    Examples:
      >>> model = MLP(64, width=32, depth=4, out_features=10, rngs=nnx.Rngs(0))
      >>> muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=muon_dimensions(model))
    """

    def numbers(parameter: Parameter) -> optax.contrib.MuonDimensionNumbers | None:
        axes = parameter.matrix_axes
        return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)

    return _mapped(model, numbers)


def _mapped(model: Any, value: Callable[[Parameter], Any]) -> nnx.State:
    found = {} if isinstance(model, nnx.State | dict) else parameters_of(model)
    if not found:
        raise UserError(
            f"a {type(model).__name__} without modules has no kinds of parameters; give the model, "
            "or what nnx.eval_shape makes of it"
        )
    return nnx.from_flat_state([(path, value(one)) for path, one in found.items()])
