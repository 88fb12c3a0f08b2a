"""How signals and gradients change on their way through the layers of a network.

A signal that vanishes or explodes with depth takes the gradient with it (paper, section 2), and if
the angles between signals close with depth, the network forgets its input. `propagate` measures
all of this in one forward and backward pass of any model with a `Stack` or with gated layers,
scanned or not, trained or not.
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

from rezero_jax.analysis.probe import Measured, Slot, Tape, path_name, probed

Loss = Callable[[Any, Any], Array]


@partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("names",))
@dataclasses.dataclass(frozen=True)
class _Traced:
    """The fields of a `Propagation`, as a compiled function returns them."""

    names: tuple[str, ...]
    arrays: dict[str, Array]


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
      share: |x' - x| / |x|, how far a layer moves the signal; NaN if it changes the shape.
      alpha: the layer's gate; the mean |alpha| where it has several, NaN where it has none.
    """

    names: tuple[str, ...]
    signal: Float[np.ndarray, " points"]
    gradient: Float[np.ndarray, " points"]
    cosine: Float[np.ndarray, " points"]
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
      x: a batch of two examples or more.
      loss: (model, x) -> losses (batch,). By default `random_projection`, which calls model(x).

    Raises:
      UserError: the model has no such layers, or one of them runs more than once in a pass.
    """
    found = _propagate(loss, model, x)
    return Propagation(found.names, **{k: np.asarray(v) for k, v in found.arrays.items()})


@partial(jax.jit, static_argnums=0)
def _propagate(loss: Loss, model: nnx.Module, x: Any) -> _Traced:
    tape = Tape()
    twin, segments = probed(model, tape)

    def objective(slots: nnx.State) -> tuple[Array, nnx.State]:
        copy = nnx.clone(twin)
        nnx.update(copy, slots)
        return loss(copy, x).sum(), nnx.state(copy, Measured)

    gradients, measured = jax.grad(objective, has_aux=True)(nnx.state(twin, Slot))
    nnx.update(twin, gradients, measured)
    ran = {path_name(path): segments[path].probes for path in tape.order}
    layers = {name: sum(probe.slot.size // 2 for probe in probes) for name, probes in ran.items()}
    probes = [probe for of_one in ran.values() for probe in of_one]
    gradient = jnp.concatenate([probe.slot[...].reshape(-1, 2) for probe in probes])
    seen = jnp.concatenate([probe.measured[...].reshape(-1, 3, 2) for probe in probes])

    def points(values: Float[Array, "layers 2"]) -> Float[Array, " points"]:
        return jnp.append(values[:1, 0], values[:, 1])

    names = tuple(
        name if count == 1 else f"{name}.{layer}"
        for name, count in layers.items()
        for layer in range(count)
    )
    arrays = {
        "signal": points(seen[:, 0]),
        "gradient": points(gradient),
        "cosine": points(seen[:, 1]),
        "share": seen[:, 2, 1],
        "alpha": jnp.concatenate([probe.alphas for probe in probes]),
    }
    return _Traced(names, arrays)


def trunk(
    model: nnx.Module, x: Any, loss: Loss = random_projection
) -> tuple[Callable[[Array], Array], Array]:
    """The layers of the model as a function, from what enters the first to what leaves the last.

    Args:
      model, x, loss: see `propagate`; x is what reaches the parts outside of the layers.

    Returns:
      The function, for batches of x's size, and what enters the first layer for x: the arguments of
      the functions in `rezero_jax.analysis.singular_values`, also for models that read tokens.
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
