"""The training state: one plain pytree of arrays, and the way from a Flax module to it and back."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from rezero_jax.residual import Alpha, Constant, Mix, Rule
from rezero_jax.stack import Stack, split_params

# {"step": int32 (), "params": nested dict, "stats": nested dict, "opt_state": optax's tree}.
State = dict[str, Any]
MakeModel = Callable[[nnx.Rngs], nnx.Module]
MatrixAxes = tuple[tuple[int, ...], tuple[int, ...]]  # of the inputs, of the outputs


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its arrays.

    Attributes:
      graphdef: the module's structure.
      shapes: the parameters' shapes and dtypes, a nested dict.
      alpha_paths: paths "a/b/c" of the gates, found by their type.
      mix_paths: paths of the numbers by which a rule mixes streams, found by their type.
      rates: path -> what its learning rate is multiplied by, where a parameter declares a `rate`.
      epsilon_scales: path -> what Adam's epsilon is multiplied by, as the layer's rule says.
      rate_scales: path -> what the learning rate of any optimizer but SGD is, the same.
      stacked_paths: paths of the parameters whose leading axis runs over layers.
      has_stats: whether training changes arrays beside the parameters, as BatchNorm's running
        statistics.
      model_axes: path -> axis, counted from the end, that is cut along the mesh axis `model`; a
        parameter declares it where it is made, as nnx.Param(value, model_axis=-1) or by the
        `kernel_metadata` of a layer of Flax.
      matrix_axes: path -> axes of the inputs and of the outputs, counted from the end, of each
        matrix of the trunk, which is what holds the stacks: the kernels of linear layers, and
        parameters that declare theirs, as nnx.Param(value, matrix_axes=((-4,), (-3, -1))).
    """

    graphdef: nnx.GraphDef
    shapes: Any
    alpha_paths: frozenset[str]
    mix_paths: frozenset[str]
    rates: Mapping[str, float]
    epsilon_scales: Mapping[str, float]
    rate_scales: Mapping[str, float]
    stacked_paths: frozenset[str]
    has_stats: bool
    model_axes: Mapping[str, int]
    matrix_axes: Mapping[str, MatrixAxes]

    def model(self, params: Any, stats: Any) -> nnx.Module:
        """The module with these arrays in it."""
        return nnx.merge(self.graphdef, params, stats)

    def alphas(self, params: Any) -> Array:
        """Every gate in the order of the layers, float32 (gates,).

        A gate per channel is represented by the mean of its absolute values. Where each sublayer
        has a gate, those of a layer follow each other.
        """
        stacks: dict[str, list[Array]] = {}  # each (layers,); a gate of no stack is one by itself
        for path, leaf in jax.tree.leaves_with_path(params):
            text = path_text(path)
            if text not in self.alpha_paths:
                continue
            stacked = text in self.stacked_paths
            stack = text[: text.index("blocks/")] if stacked else text
            stacks.setdefault(stack, []).append(one_per_layer(leaf if stacked else leaf[None]))
        values = [jnp.stack(gates, axis=1).reshape(-1) for gates in stacks.values()]
        return jnp.concatenate(values) if values else jnp.zeros((0,))

    @property
    def parameter_count(self) -> int:
        """Number of trainable numbers, gates included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))


def model_spec(make_model: MakeModel) -> ModelSpec:
    """The spec of the model that `make_model(rngs)` makes; no array is computed."""
    model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    graphdef, params, stats = split_params(model)
    shapes = nnx.to_pure_dict(params)
    variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
    stacks = [
        (path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Stack)
    ]
    scanned = tuple(
        "/".join(map(str, (*path, "blocks", "")))
        for path, stack in stacks
        if not isinstance(stack.blocks, nnx.List)
    )
    trunk = tuple("/".join(map(str, (*path[:1], ""))) for path, _ in stacks)
    axes = {path: variable.get_metadata("model_axis", None) for path, variable in variables.items()}
    rates = {path: variable.get_metadata("rate", None) for path, variable in variables.items()}
    return ModelSpec(
        graphdef,
        shapes,
        alpha_paths=frozenset(
            p for p, variable in variables.items() if isinstance(variable, Alpha)
        ),
        mix_paths=frozenset(p for p, variable in variables.items() if isinstance(variable, Mix)),
        rates={path: rate for path, rate in rates.items() if rate is not None},
        epsilon_scales=_scales("epsilon_scale", stacks, variables),
        rate_scales=_scales("rate_scale", stacks, variables),
        stacked_paths=frozenset(path for path in variables if path.startswith(scanned)),
        has_stats=any(not isinstance(v, Constant) for _, v in nnx.to_flat_state(stats)),
        model_axes={path: axis for path, axis in axes.items() if axis is not None},
        matrix_axes={
            path: matrix
            for path, variable in variables.items()
            if path.startswith(trunk)
            and (matrix := _matrix_axes(path, variable, variable.ndim - path.startswith(scanned)))
        },
    )


def _matrix_axes(path: str, variable: nnx.Variable, ndim: int) -> MatrixAxes | None:
    """Those of a parameter that has `ndim` axes in one layer; None if it is no matrix."""
    is_linear = path.endswith("/kernel") and ndim == 2
    return variable.get_metadata("matrix_axes", ((-2,), (-1,)) if is_linear else None)


def _scales(name: str, stacks: list[tuple[Any, Stack]], paths: Iterable[str]) -> dict[str, float]:
    """An attribute of the layers' rules by the paths of their parameters, where it is not 1."""
    scales: dict[str, float] = {}
    for path, stack in stacks:
        rules = (m for _, m in nnx.iter_modules(stack) if isinstance(m, Rule))
        scale = next((getattr(rule, name) for rule in rules), 1.0)
        prefix = "/".join(map(str, (*path, "blocks", "")))
        if scale != 1:
            scales |= {p: scale for p in paths if p.startswith(prefix)}
    return scales


def init_state(make_model: MakeModel, optimizer: optax.GradientTransformation, key: Array) -> State:
    """The state after no updates; jit it whole, so that arrays are made where they will live."""
    _, param_state, stats = split_params(make_model(nnx.Rngs(key)))
    params = nnx.to_pure_dict(param_state)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "stats": nnx.to_pure_dict(stats),
        "opt_state": optimizer.init(params),
    }


def path_text(path: Any) -> str:
    """A tree path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def one_per_layer(gates: Array) -> Array:
    """Gates (layers, ...) as one a layer: the gate itself, or the mean |alpha| of several."""
    gates = gates.reshape(len(gates), -1)
    return gates[:, 0] if gates.shape[1] == 1 else jnp.abs(gates).mean(axis=1)
