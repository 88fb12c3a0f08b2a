"""Ablation: the loss of a trained network with some layers replaced by the identity."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rezero_jax.analysis.propagation import Loss, layer_names, layer_paths, wrapped
from rezero_jax.analysis.theme import COLOURS, themed
from rezero_jax.errors import UserError
from rezero_jax.formatting import markdown_table, number
from rezero_jax.residual import Constant

ROWS = 20  # maximum rows in the table


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Mean losses (nats) with layers left out.

    Attributes:
      names: names of the layers, in the order of the network.
      loss: the loss with all layers.
      without: the loss without each layer.
      order: the layers, the least important one first.
      cumulative: the loss without the first 1, 2, ... layers of `order`.
    """

    names: tuple[str, ...]
    loss: float
    without: Float[np.ndarray, " layers"]
    order: Int[np.ndarray, " layers"]
    cumulative: Float[np.ndarray, " layers"]

    def __str__(self) -> str:
        rises = self.without - self.loss
        lines = [("layer left out", "loss", "rise")]
        for layer in self.order[::-1][:ROWS]:
            left = number(float(self.without[layer]))
            lines.append((self.names[layer], left, f"{rises[layer]:+.3g}"))
        layers = len(self.names)
        free = int(np.append(self.cumulative > 1.01 * self.loss, True).argmax())
        shown = f" (the {ROWS} most important ones below)" if layers > ROWS else ""
        return (
            f"loss with all {layers} layers{shown}: {number(self.loss)} nats\n\n"
            f"{markdown_table(lines)}\n\n"
            f"{free} of {layers} layers can be left out together before the loss rises by 1 %."
        )


class _Optional(nnx.Module):
    """A layer that is left out where `is_kept` is false; `depth` as in `wrapped`."""

    def __init__(self, layer: nnx.Module, depth: tuple[int, ...] = ()):
        self.layer = layer
        self.is_kept = Constant(jnp.ones(depth, bool))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        return jnp.where(self.is_kept[...], self.layer(x, *args, **kwargs), x)  # type: ignore[operator]


def ablate(model: nnx.Module, x: Any, loss: Loss) -> Ablation:
    """Leaves out each layer, and then ever more layers in the order of their importance.

    A layer is what `propagate` takes for one, except those that change the shape of x.

    Args:
      model: a trained model; call `model.eval()` first if it has dropout.
      x: a batch of examples.
      loss: (model, x) -> losses (batch,), such as `OpenRun.losses`.

    Raises:
      UserError: the model has no layers that can be left out.

    Examples:
      >>> from rezero_jax.analysis.ablation import ablate
      >>> run = open_run("runs/digits")
      >>> print(ablate(run.model, run.examples(100), run.losses))
    """
    paths = [path for path in layer_paths(model) if path[-1:] != ("entry",)]
    twin = nnx.recursive_map(
        lambda path, node: wrapped(node, _Optional) if path in paths else node, nnx.clone(model)
    )
    if not paths:
        raise UserError(f"no layer of the {type(model).__name__} can be left out")
    modules = dict(nnx.iter_modules(model))
    names = [name for path in paths for name in layer_names(path, modules[path])]
    layers = len(names)
    alone = np.asarray(_mean_losses(loss, twin, x, ~np.eye(layers + 1, layers, -1, dtype=bool)))
    order = np.argsort(alone[1:], kind="stable")
    ranks = np.argsort(order)
    together = np.asarray(_mean_losses(loss, twin, x, ranks[None] > np.arange(layers)[:, None]))
    return Ablation(tuple(names), float(alone[0]), alone[1:], order, together)


@partial(jax.jit, static_argnums=0)
def _mean_losses(
    loss: Loss, twin: nnx.Module, x: Any, kept: Bool[Array | np.ndarray, "n layers"]
) -> Float[Array, " n"]:
    """The mean loss for each row of `kept`, whether each layer is in the network."""

    def one(row: Bool[Array, " layers"]) -> Array:
        copy = nnx.clone(twin)
        gates = [m.is_kept for _, m in nnx.iter_modules(copy) if isinstance(m, _Optional)]
        parts = jnp.split(row, np.cumsum([gate.size for gate in gates])[:-1])
        for gate, part in zip(gates, parts, strict=True):
            gate[...] = part.reshape(gate.shape)
        return loss(copy, x).mean()

    return jax.lax.map(one, kept)


@themed
def plot_ablation(ablation: Ablation) -> Figure:
    """The rise of the loss without each layer, and the loss while layers are left out in turn."""
    figure = Figure(figsize=(8, 3.2))
    alone, together = figure.subplots(1, 2)
    layers = np.arange(len(ablation.names))
    alone.bar(layers, ablation.without - ablation.loss, width=0.9, color=COLOURS[0])
    alone.set(xlabel="layer left out, from 0", title="rise of the loss (nats)")
    points = [ablation.loss, *ablation.cumulative]
    together.plot(range(len(points)), points, color=COLOURS[1])
    together.set(xlabel="layers left out, the least important first", title="loss (nats)")
    together.ticklabel_format(axis="y", useOffset=False)
    for axis in (alone, together):
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    figure.suptitle("Look for layers without a bar, and for how long the line stays flat")
    return figure
