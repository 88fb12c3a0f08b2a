"""How signals and gradients fare on their way through the layers of a network.

A signal that vanishes or explodes with depth takes the gradient with it (paper, section 2), and one
whose angles close with depth forgets its input. `propagate` measures all of them in one forward and
backward pass of any model with a `Stack` or with gated layers, scanned or not, trained or not.
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

from rezero_jax.analysis.probe import (
    AFTER,
    BEFORE,
    CHANGE,
    COSINE,
    SHARE,
    SIGNAL,
    ModulePath,
    Tape,
    path_name,
    probed,
)

Loss = Callable[[Any, Any], Array]


@partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("names",))
@dataclasses.dataclass(frozen=True)
class _Traced:
    """The fields of a `Propagation`, as they leave a compiled function."""

    names: tuple[str, ...]
    arrays: Any


@dataclasses.dataclass(frozen=True)
class Propagation:
    """What passed through the layers, float32, each a mean over the examples of a batch.

    Index 0 of an array of layers + 1 is what enters the first layer, index i + 1 what leaves layer
    i. Norms are over all of an example, such as all positions and channels.

    Attributes:
      names: of the layers, in the order in which they ran.
      signal: |x|.
      gradient: |dL/dx|, where L is the loss of the example itself.
      cosine: of the angle between the signals of two examples, neighbours in the batch; NaN for a
        batch of one.
      change: |x' - x|, how far a layer moves the signal: for rules that add a branch to the trunk
        the norm of what is added, such as |alpha F(x)|. NaN for a layer that changes the shape.
      share: |x' - x| / |x|.
      alpha: the layer's gate; the mean |alpha| where it has several, NaN where it has none.
    """

    names: tuple[str, ...]
    signal: Float[np.ndarray, " points"]
    gradient: Float[np.ndarray, " points"]
    cosine: Float[np.ndarray, " points"]
    change: Float[np.ndarray, " layers"]
    share: Float[np.ndarray, " layers"]
    alpha: Float[np.ndarray, " layers"]

    @property
    def idle_below(self) -> float:
        """The share below which a layer idles: 0.1 / layers.

        If every layer were as idle, all of them together would move the signal by a tenth of it.
        """
        return 0.1 / len(self.names)

    @property
    def idle(self) -> Bool[np.ndarray, " layers"]:
        """Whether each layer idles; False where its share is unknown."""
        return self.share < self.idle_below


def random_projection(model: Any, x: Any) -> Array:
    """The loss <v, model(x)> of every example, (batch,), with a fixed standard normal v.

    Its gradient is J^T v: how large a gradient that arrives as 1 at every output becomes.
    """
    y = model(x)
    v = jax.random.normal(jax.random.key(0), y.shape[1:])
    return (y * v[None]).reshape(len(y), -1).sum(axis=1)


def propagate(model: nnx.Module, x: Any, loss: Loss = random_projection) -> Propagation:
    """Measures a forward and backward pass of the model, in the mode (train or eval) it is in.

    Args:
      model: a module with a `Stack`, or with layers joined by a rule of `rezero_jax.residual`.
      x: a batch of two examples or more, which is all that `loss` needs besides the model.
      loss: (model, x) -> losses (batch,). By default `random_projection`, which calls model(x).

    Raises:
      UserError: the model has no such layers, or one of them runs more than once in a pass.
    """
    found = _propagate(loss, model, x)
    return Propagation(found.names, **{k: np.asarray(v) for k, v in found.arrays.items()})


@partial(jax.jit, static_argnums=0)
def _propagate(loss: Loss, model: nnx.Module, x: Any) -> _Traced:
    tape = Tape()

    def objective(slots: dict[ModulePath, Array]) -> tuple[Array, tuple[Array, Array]]:
        twin, segments = probed(model, tape)
        for path, segment in segments.items():
            segment.fill(slots[path])
        total = loss(twin, x).sum()
        ran = [segments[path] for path in tape.order]
        seen = jnp.concatenate([segment.seen() for segment in ran])
        return total, (seen, jnp.concatenate([segment.alphas() for segment in ran]))

    _, segments = probed(model, tape)
    slots = {path: segment.slots() for path, segment in segments.items()}
    gradients, (seen, alpha) = jax.grad(objective, has_aux=True)(slots)
    gradient = jnp.concatenate([gradients[path] for path in tape.order])
    names = [
        path_name(path) if len(slots[path]) == 1 else f"{path_name(path)}.{layer}"
        for path in tape.order
        for layer in range(len(slots[path]))
    ]

    def points(values: Float[Array, "layers 2"]) -> Float[Array, " points"]:
        return jnp.concatenate([values[:1, BEFORE], values[:, AFTER]])

    arrays = {
        "signal": points(seen[:, SIGNAL]),
        "gradient": points(gradient),
        "cosine": points(seen[:, COSINE]),
        "change": seen[:, CHANGE, AFTER],
        "share": seen[:, SHARE, AFTER],
        "alpha": alpha,
    }
    return _Traced(tuple(names), arrays)


def trunk(
    model: nnx.Module, x: Any, loss: Loss = random_projection
) -> tuple[Callable[[Array], Array], Array]:
    """The layers of the model as a function, from what enters the first to what leaves the last.

    Args:
      model, x, loss: see `propagate`; x is what reaches the parts outside of the layers.

    Returns:
      The function, for batches of the size of x's, and what enters the first layer when the model
      is given x. Together they are what `rezero_jax.analysis.singular_values` takes, also of
      models whose inputs are tokens.
    """

    return Partial(partial(_through, loss), model, x), _entered(loss, model, x)


@partial(jax.jit, static_argnums=0)
def _entered(loss: Loss, model: nnx.Module, x: Any) -> Array:
    return _run(loss, model, x, Tape()).entered


def _through(loss: Loss, model: nnx.Module, x: Any, entered: Array) -> Array:
    return _run(loss, model, x, Tape(entered)).left


def _run(loss: Loss, model: nnx.Module, x: Any, tape: Tape) -> Any:
    loss(probed(model, tape)[0], x)
    return tape
