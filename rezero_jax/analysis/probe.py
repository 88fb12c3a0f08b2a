"""Probes around the layers of a model: they measure a signal and its gradient, unchanged.

A layer is a block of a `Stack`, the entry of a ResNet's stage, or, outside of these, a `ReZero` or
a module with a rule of `rezero_jax.residual`. A probe replaces the layer in its place, so a scanned
stack is still scanned. It keeps a few float32 numbers and no activations.
"""

import dataclasses
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from rezero_jax.analysis.singular_values import safe_norms
from rezero_jax.errors import UserError
from rezero_jax.models.resnet.model import Stage
from rezero_jax.residual import Alpha, ReZero, Rule
from rezero_jax.stack import Stack
from rezero_jax.training.state import one_per_layer

ModulePath = tuple[Any, ...]


class Measured(nnx.Variable):
    """A probe's measurements in the last pass, (3, 2); see `Probe`."""


class Slot(nnx.Variable):
    """Zeros (2,), whose gradient is the mean norm of the loss's gradient before and after."""


class Probe(nnx.Module):
    """Measures a layer's input x and output x', as means over the examples of the batch.

        |x|                                         |x'|
        cosine of two neighbouring examples' x      the same of x'
        NaN                                         |x' - x| / |x|

    The cosine is NaN for a single example; |x' - x| / |x| is NaN where the layer changes the shape.

    Args:
      layer: the layer, or the stacked layers of a scanned stack.
      depth: size of the leading axis of stacked layers; () for a single layer.
    """

    def __init__(self, layer: nnx.Module, depth: tuple[int, ...] = ()):
        self.layer = layer
        self.measured = Measured(jnp.zeros((*depth, 3, 2), jnp.float32))
        self.slot = Slot(jnp.zeros((*depth, 2), jnp.float32))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        before, after = self.slot[...]
        x = _pass(x, before)
        y = _pass(self.layer(x, *args, **kwargs), after)  # type: ignore[operator]
        self.measured[...] = _measure(*map(jax.lax.stop_gradient, (x, y)))
        return y

    @property
    def alphas(self) -> Float[Array, " layers"]:
        """Each layer's gate; the mean |alpha| of a layer with several, NaN for a layer without."""
        layers = self.slot.size // 2
        gates = jax.tree.leaves(nnx.state(self, Alpha))
        if not gates:
            return jnp.full((layers,), jnp.nan)
        flat = [gate.reshape(layers, -1) for gate in gates]
        return one_per_layer(jnp.concatenate(flat, axis=1))


@jax.custom_vjp
def _pass(x: Array, slot: Array) -> Array:
    """x; the slot's gradient is the mean norm of the gradient with respect to x."""
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


def _cosine(x: Array) -> Array:
    if len(x) == 1:
        return jnp.array(jnp.nan)
    flat = x.reshape(len(x), -1).astype(jnp.float32)
    unit = flat / safe_norms(x)[:, None]
    return (unit * jnp.roll(unit, -1, axis=0)).sum(axis=1).mean()


@dataclasses.dataclass(eq=False)  # hashed by identity, as a static part of the modules
class Tape:
    """Notes of one pass over a probed model.

    Attributes:
      given: replaces the first segment's input, if it is set.
      order: paths of the segments, in the order in which they ran.
      entered: the first segment's input.
      left: the last segment's output.
    """

    given: Array | None = None
    order: list[ModulePath] = dataclasses.field(default_factory=list)
    entered: Array | None = None
    left: Array | None = None


class Segment(nnx.Module):
    """A stack or a single layer in its place in a model, with probes; notes its runs on a tape."""

    def __init__(self, module: nnx.Module, path: ModulePath, tape: Tape):
        self.path, self.tape = nnx.static(path), nnx.static(tape)
        self.module: nnx.Module = module
        if not isinstance(module, Stack):
            self.module = Probe(module)
        elif isinstance(module.blocks, nnx.List):
            module.blocks = nnx.List([Probe(block) for block in module.blocks])
        else:
            module.blocks = Probe(module.blocks, (module.depth,))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        tape = self.tape
        if self.path in tape.order:
            raise UserError(
                f"the layers {path_name(self.path)} run more than once in a pass, so their signals "
                "are not distinct; study a model that does not share layers"
            )
        if not tape.order:
            x = x if tape.given is None else tape.given
            tape.entered = x
        tape.order.append(self.path)
        tape.left = self.module(x, *args, **kwargs)  # type: ignore[operator]
        return tape.left

    @property
    def probes(self) -> list[Probe]:
        """One probe for each layer, or a stacked probe for all layers."""
        blocks = self.module.blocks if isinstance(self.module, Stack) else self.module
        return list(blocks) if isinstance(blocks, nnx.List) else [blocks]  # type: ignore[list-item]


def probed(model: nnx.Module, tape: Tape) -> tuple[nnx.Module, dict[ModulePath, Segment]]:
    """A copy of the model with its layers in segments, and the segments by their paths.

    Raises:
      UserError: the model has no layers.
    """
    paths = _segment_paths(model)
    if not paths:
        raise UserError(
            f"no layers were found in the {type(model).__name__}; put its blocks into a Stack, or "
            "wrap their branches in ReZero or another rule of rezero_jax.residual"
        )
    segments = {}
    holder: Any = nnx.List([nnx.clone(model)])  # so that the model itself can be a segment
    for path in paths:
        *owners, last = (0, *path)
        owner = reduce(_child, owners, holder)
        segments[path] = Segment(_child(owner, last), path, tape)
        if isinstance(last, int):
            owner[last] = segments[path]
        else:
            setattr(owner, last, segments[path])
    return holder[0], segments


def path_name(path: ModulePath) -> str:
    """A path as "trunk.layers"; the model's own path is "model"."""
    return ".".join(map(str, path)) or "model"


def _segment_paths(model: nnx.Module) -> list[ModulePath]:
    if isinstance(model, Stack):
        return [()]
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Stack) or _is_layer(module):
            found.append(path)
        if isinstance(module, Stage) and module.entry is not None:
            found.append((*path, "entry"))
    # A layer within a layer is part of the outer one, but a model with layers is not a layer.
    inner = [path for path in dict.fromkeys(found) if path]
    outer = [p for p in inner if not any(p[:i] in inner for i in range(1, len(p)))]
    return outer or found


def _is_layer(module: nnx.Module) -> bool:
    if isinstance(module, ReZero):
        return True
    parts = [part for part in vars(module).values() if not isinstance(part, ReZero)]
    lists = [part for part in parts if isinstance(part, nnx.List)]
    parts += [part for some in lists for part in some if not isinstance(part, ReZero)]
    return any(isinstance(part, Rule) for part in parts) and not isinstance(module, nnx.List)


def _child(owner: Any, key: Any) -> Any:
    return owner[key] if isinstance(key, int) else getattr(owner, key)
