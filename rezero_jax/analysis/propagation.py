"""Propagation of signals and gradients through the layers of a network.

If signals vanish or explode with depth, so do gradients (paper, section 2). If the angles between
the signals of different examples close with depth, the network forgets its input. `propagate`
measures both in one forward and backward pass of any model with layers, trained or not.

A layer is a block of a `Stack`, the entry of a ResNet's stage, or, outside these, a `ReZero` or a
module with a rule of `rezero_jax.residual`. A probe wraps each layer, so a scanned stack remains
scanned, and stores a few float32 numbers but no activations.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Bool, Float

from rezero_jax.analysis.singular_values import safe_norms
from rezero_jax.errors import UserError
from rezero_jax.models.resnet.model import Stage
from rezero_jax.residual import Alpha, ReZero, Rule
from rezero_jax.stack import Stack
from rezero_jax.training.state import one_per_layer

Loss = Callable[[Any, Any], Array]
ModulePath = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Propagation:
    """Measurements of the signals between layers, float32 means over the examples of a batch.

    Point 0 is the input of the first layer, point i + 1 the output of layer i. A norm covers a
    whole example, with all positions and channels.

    Attributes:
      names: names of the layers, in execution order.
      signal: |x| at each point.
      gradient: |dL/dx| at each point, where L is the loss of the example itself.
      cosine: cosine between the signals of neighbouring examples of the batch at each point; NaN
        for a batch of one.
      share: |x' - x| / |x|, the relative change by each layer; NaN if the layer changes the shape.
      alpha: each layer's gate; mean |alpha| for several gates, NaN for none.
      weight_gradient: norm of the gradient of the mean loss with respect to the layer's parameters.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    signal: Float[Array | np.ndarray, " points"]
    gradient: Float[Array | np.ndarray, " points"]
    cosine: Float[Array | np.ndarray, " points"]
    share: Float[Array | np.ndarray, " layers"]
    alpha: Float[Array | np.ndarray, " layers"]
    weight_gradient: Float[Array | np.ndarray, " layers"]

    @property
    def idle_below(self) -> float:
        """The share below which a layer is idle: n idle layers change x by about 0.1 |x|."""
        return 0.1 / len(self.names)

    @property
    def idle(self) -> Bool[np.ndarray, " layers"]:
        """Whether each layer is idle; False if its share is unknown."""
        return np.asarray(self.share) < self.idle_below


def random_projection(model: Any, x: Any) -> Array:
    """The loss <v, model(x)> of every example, (batch,), for a fixed standard normal v."""
    y = model(x)
    v = jax.random.normal(jax.random.key(0), y.shape[1:], y.dtype)
    return (y * v[None]).reshape(len(y), -1).sum(axis=1)


def propagate(model: nnx.Module, x: Any, loss: Loss = random_projection) -> Propagation:
    """Measures a forward and backward pass of the model, in its current mode (train or eval).

    Args:
      model: a module with a `Stack`, or with layers joined by a rule of `rezero_jax.residual`.
      x: a batch of two examples or more.
      loss: (model, x) -> losses (batch,). By default `random_projection`, which calls model(x).

    Raises:
      UserError: the model has no such layers, or runs a layer more than once.

    Examples:
      >>> from rezero_jax.analysis.propagation import propagate
      >>> model = MLP(64, width=32, depth=100, out_features=10, rngs=nnx.Rngs(0))
      >>> signal = propagate(model, jax.random.normal(jax.random.key(0), (8, 64))).signal
    """
    return jax.tree.map(np.asarray, _propagate(loss, model, x))


@partial(jax.jit, static_argnums=0)
def _propagate(loss: Loss, model: nnx.Module, x: Any) -> Propagation:
    tape = _Tape()
    twin = _probed(model, tape)

    def objective(slots: nnx.State, params: nnx.State) -> tuple[Array, tuple[nnx.State, int]]:
        copy = nnx.clone(twin)
        nnx.update(copy, slots, params)
        losses = loss(copy, x)
        return losses.sum(), (nnx.state(copy, _Measured), len(losses))

    given = (nnx.state(twin, _Slot), nnx.state(twin, nnx.Param))
    both, (measured, examples) = jax.grad(objective, argnums=(0, 1), has_aux=True)(*given)
    gradients, of_params = both
    nnx.update(twin, gradients, measured)
    segments = {m.path: m for _, m in nnx.iter_modules(twin) if isinstance(m, _Segment)}
    ran = [segments[path] for path in tape.runs]
    names = [name for segment in ran for name in layer_names(segment.path, segment.module)]
    probes = [m for segment in ran for _, m in nnx.iter_modules(segment) if isinstance(m, _Probe)]
    slots = jnp.concatenate([probe.slot[...].reshape(-1, 1, 2) for probe in probes])
    seen = jnp.concatenate([probe.measured[...].reshape(-1, 3, 2) for probe in probes])
    layers = jnp.concatenate([slots, seen], axis=1)
    gradient, signal, cosine, share = jnp.append(layers[:1, :, 0], layers[:, :, 1], axis=0).T
    alpha = jnp.concatenate([probe.alphas for probe in probes])
    nnx.update(twin, of_params)  # in place of the parameters
    weights = jnp.concatenate([probe.norms() for probe in probes]) / examples
    return Propagation(tuple(names), signal, gradient, cosine, share[1:], alpha, weights)


def trunk(
    model: nnx.Module, x: Any, loss: Loss = random_projection
) -> tuple[Callable[[Array], Array], Array]:
    """The layers of the model as a function, for `rezero_jax.analysis.singular_values`.

    Returns:
      A function from the first layer's input to the last layer's output, for batches of x's size,
      and the first layer's input for x.
    """
    return Partial(_Through(loss), model, x), _entered(loss, model, x)


@dataclasses.dataclass(frozen=True)
class _Through:
    """The layers as a function, equal for equal losses, so that compiled code is shared."""

    loss: Loss

    def __call__(self, model: nnx.Module, x: Any, entered: Array) -> Array:
        return trunk_ends(model, x, self.loss, entered)[1]


@partial(jax.jit, static_argnums=0)
def _entered(loss: Loss, model: nnx.Module, x: Any) -> Array:
    return trunk_ends(model, x, loss)[0]


def trunk_ends(
    model: nnx.Module, x: Any, loss: Callable[[Any, Any], Any], entered: Array | None = None
) -> tuple[Array, Array]:
    """The first layer's input, replaced by `entered` if given, and the last layer's output."""
    tape = _Tape(entered)
    loss(_probed(model, tape), x)
    runs = list(tape.runs.values())
    return runs[0][0], runs[-1][1]


class _Measured(nnx.Variable):
    """A probe's measurements in the last pass, (3, 2); see `_Probe`."""


class _Slot(nnx.Variable):
    """Zeros (2,); their gradients are the mean norms of dL/dx before and after the layer."""


class _Probe(nnx.Module):
    """Measures a layer's input x and output x', as means over the examples of the batch.

        |x|                                     |x'|
        cosine of neighbouring examples' x      cosine of neighbouring examples' x'
        NaN                                     |x' - x| / |x|

    `depth` is that of `wrapped`.
    """

    def __init__(self, layer: nnx.Module, depth: tuple[int, ...] = ()):
        self.layer = layer
        self.measured = _Measured(jnp.zeros((*depth, 3, 2), jnp.float32))
        self.slot = _Slot(jnp.zeros((*depth, 2), jnp.float32))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        before, after = self.slot[...]
        x = _pass(x, before)
        y = _pass(self.layer(x, *args, **kwargs), after)  # type: ignore[operator]
        self.measured[...] = _measure(*map(jax.lax.stop_gradient, (x, y)))
        return y

    def norms(self) -> Float[Array, " layers"]:
        """Norms over all parameters of each layer."""
        layers = self.slot.size // 2
        leaves = jax.tree.leaves(nnx.state(self.layer, nnx.Param))
        squares = [jnp.square(leaf.astype(jnp.float32)).reshape(layers, -1) for leaf in leaves]
        return jnp.sqrt(sum((square.sum(axis=1) for square in squares), jnp.zeros(layers)))

    @property
    def alphas(self) -> Float[Array, " layers"]:
        layers = self.slot.size // 2
        gates = [gate.reshape(layers, -1) for gate in jax.tree.leaves(nnx.state(self, Alpha))]
        return one_per_layer(
            jnp.concatenate(gates or [jnp.full((layers, 1), jnp.nan, jnp.float32)], axis=1)
        )


@jax.custom_vjp
def _pass(x: Array, slot: Array) -> Array:
    """Returns x; the slot's gradient is the mean norm of the gradient with respect to x."""
    return x


def _pass_back(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, safe_norms(gradient).mean().astype(jnp.float32)


_pass.defvjp(lambda x, slot: (x, None), _pass_back)


def _measure(x: Array, y: Array) -> Float[Array, "3 2"]:
    before, after = safe_norms(x), safe_norms(y)
    share: Array | float = jnp.nan
    if x.shape == y.shape:
        changes = safe_norms(y.astype(jnp.float32) - x.astype(jnp.float32))
        share = (changes / before).mean()
    return jnp.array(
        [[before.mean(), after.mean()], [_cosine(x), _cosine(y)], [jnp.nan, share]], jnp.float32
    )


def _cosine(x: Array) -> Array | float:
    flat = x.reshape(len(x), -1).astype(jnp.float32)
    unit = flat / safe_norms(x)[:, None]
    return (unit * jnp.roll(unit, -1, axis=0)).sum(axis=1).mean() if len(x) > 1 else jnp.nan


@dataclasses.dataclass(eq=False)  # hashed by identity, as a static part of the modules
class _Tape:
    """Input and output of each segment in one pass, by path, in execution order.

    If set, `given` replaces the first segment's input.
    """

    given: Array | None = None
    runs: dict[ModulePath, tuple[Array, Array]] = dataclasses.field(default_factory=dict)


class _Segment(nnx.Module):
    """Wraps a stack or a layer of a model with probes, and records its run on a tape."""

    def __init__(self, module: nnx.Module, path: ModulePath, tape: _Tape):
        self.path, self.tape = nnx.static(path), nnx.static(tape)
        self.module = wrapped(module, _Probe)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        tape = self.tape
        if self.path in tape.runs:
            raise UserError(
                f"{layer_names(self.path, self.module)[0]} runs more than once in a pass, so its "
                "signals are ambiguous; study a model that does not share layers"
            )
        if tape.given is not None and not tape.runs:
            x = tape.given
        y = self.module(x, *args, **kwargs)  # type: ignore[operator]
        tape.runs[self.path] = x, y
        return y


def wrapped(module: nnx.Module, wrap: Callable[..., nnx.Module]) -> nnx.Module:
    """A layer, or a stack, with each layer replaced by wrap(layer, depth).

    `depth` is () for one layer, or (layers,) for the stacked layers of a scanned stack.
    """
    if not isinstance(module, Stack):
        return wrap(module, ())
    if isinstance(module.blocks, nnx.List):
        module.blocks = nnx.List([wrap(block, ()) for block in module.blocks])
    else:
        module.blocks = wrap(module.blocks, (module.depth,))
    return module


def _probed(model: nnx.Module, tape: _Tape) -> nnx.Module:
    paths = layer_paths(model)

    def segment(path: ModulePath, node: Any) -> Any:
        return _Segment(node, path, tape) if path in paths else node

    return nnx.recursive_map(segment, nnx.clone(model))


def layer_names(path: ModulePath, module: nnx.Module) -> list[str]:
    """Names of the layers of a stack, such as "layers.3", or the name of a layer outside stacks."""
    name = ".".join(map(str, path)) or "model"
    return [f"{name}.{i}" for i in range(module.depth)] if isinstance(module, Stack) else [name]


def layer_paths(model: nnx.Module) -> list[ModulePath]:
    """The paths of the stacks and of the layers outside them; a UserError if there are none."""
    if isinstance(model, Stack):
        return [()]
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, (Stack, ReZero)) or _has_rule(module):
            found.append(path)
        if isinstance(module, Stage) and module.entry is not None:
            found.append((*path, "entry"))
    # A layer within a layer is part of the outer one, but a model with layers is not a layer.
    inner = [path for path in dict.fromkeys(found) if path]
    outer = [p for p in inner if not any(p[:i] in inner for i in range(1, len(p)))]
    # A model that itself calls several rules has a layer for each of them.
    rules = [path for path, module in nnx.iter_modules(model) if isinstance(module, Rule)]
    if not found:
        raise UserError(
            f"no layers were found in the {type(model).__name__}; put its blocks into a Stack, or "
            "wrap their branches in ReZero or another rule of rezero_jax.residual"
        )
    return outer or (rules if len(rules) > 1 else found)


def _has_rule(module: nnx.Module) -> bool:
    parts = list(vars(module).values())
    parts += [part for some in parts if isinstance(some, nnx.List) for part in some]
    return any(isinstance(part, Rule) for part in parts) and not isinstance(module, nnx.List)
