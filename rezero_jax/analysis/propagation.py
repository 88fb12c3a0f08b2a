"""Signals and gradients by depth, on their way through the layers of a network.

A signal that vanishes or explodes with depth takes the gradient with it (paper, section 2). If the
angles between signals close with depth, the network forgets its input. `propagate` measures all of
this in one forward and backward pass of any model with a `Stack` or with gated layers, scanned or
not, trained or not.
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
ARRAYS = ("signal", "gradient", "cosine", "share", "alpha")


@partial(jax.tree_util.register_dataclass, data_fields=ARRAYS, meta_fields=("names",))
@dataclasses.dataclass(frozen=True)
class Propagation:
    """Measurements of the signals between layers, float32 means over the examples of a batch.

    Arrays have one entry per layer, or per point between layers: point 0 is the input of the first
    layer, point i + 1 the output of layer i. A norm covers a whole example, with all positions and
    channels.

    Attributes:
      names: names of the layers, in the order in which they ran.
      signal: |x| at each point.
      gradient: |dL/dx| at each point, where L is the loss of the example itself.
      cosine: cosine between the signals of two examples, neighbours in the batch, at each point;
        NaN for a batch of one.
      share: |x' - x| / |x|, how far each layer moves the signal; NaN if it changes the shape.
      alpha: each layer's gate; the mean |alpha| of a layer with several, NaN for a layer without.
    """

    names: tuple[str, ...]
    signal: Float[Array | np.ndarray, " points"]
    gradient: Float[Array | np.ndarray, " points"]
    cosine: Float[Array | np.ndarray, " points"]
    share: Float[Array | np.ndarray, " layers"]
    alpha: Float[Array | np.ndarray, " layers"]

    @property
    def idle_below(self) -> float:
        """The share below which a layer idles: 0.1 / layers.

        If every layer idled, all layers together would move the signal by a tenth of its length.
        """
        return 0.1 / len(self.names)

    @property
    def idle(self) -> Bool[np.ndarray, " layers"]:
        """Whether each layer idles; False where its share is unknown."""
        return np.asarray(self.share) < self.idle_below


def random_projection(model: Any, x: Any) -> Array:
    """The loss <v, model(x)> of every example, (batch,), with a fixed standard normal v.

    Its gradient is J^T v: the size at x of a gradient that is 1 at every output.
    """
    y = model(x)
    v = jax.random.normal(jax.random.key(0), y.shape[1:])
    return (y * v[None]).reshape(len(y), -1).sum(axis=1)


def propagate(model: nnx.Module, x: Any, loss: Loss = random_projection) -> Propagation:
    """Measures a forward and backward pass of the model, in its present mode (train or eval).

    Args:
      model: a module with a `Stack`, or with layers joined by a rule of `rezero_jax.residual`.
      x: a batch of two examples or more.
      loss: (model, x) -> losses (batch,). By default `random_projection`, which calls model(x).

    Raises:
      UserError: the model has no such layers, or a layer runs more than once in a pass.
    """
    return jax.tree.map(np.asarray, _propagate(loss, model, x))


@partial(jax.jit, static_argnums=0)
def _propagate(loss: Loss, model: nnx.Module, x: Any) -> Propagation:
    tape = Tape()
    twin, segments = probed(model, tape)

    def objective(slots: nnx.State) -> tuple[Array, nnx.State]:
        copy = nnx.clone(twin)
        nnx.update(copy, slots)
        return loss(copy, x).sum(), nnx.state(copy, Measured)

    gradients, measured = jax.grad(objective, has_aux=True)(nnx.state(twin, Slot))
    nnx.update(twin, gradients, measured)
    names, probes = [], []
    for path in tape.order:
        probes += segments[path].probes
        layers = sum(probe.slot.size // 2 for probe in segments[path].probes)
        name = path_name(path)
        names += [name] if layers == 1 else [f"{name}.{layer}" for layer in range(layers)]
    gradient = jnp.concatenate([probe.slot[...].reshape(-1, 2) for probe in probes])
    seen = jnp.concatenate([probe.measured[...].reshape(-1, 3, 2) for probe in probes])

    def points(values: Float[Array, "layers 2"]) -> Float[Array, " points"]:
        return jnp.append(values[:1, 0], values[:, 1])

    return Propagation(
        names=tuple(names),
        signal=points(seen[:, 0]),
        gradient=points(gradient),
        cosine=points(seen[:, 1]),
        share=seen[:, 2, 1],
        alpha=jnp.concatenate([probe.alphas for probe in probes]),
    )


def trunk(
    model: nnx.Module, x: Any, loss: Loss = random_projection
) -> tuple[Callable[[Array], Array], Array]:
    """The layers of the model as a function, from the first layer's input to the last's output.

    Args:
      model, x, loss: see `propagate`; x is the input of the parts outside the layers.

    Returns:
      The function, for batches of x's size, and the first layer's input for x. These are arguments
      for the functions in `rezero_jax.analysis.singular_values`, also for models that read tokens.
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
