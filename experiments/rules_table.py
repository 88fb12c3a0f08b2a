"""The table of all residual rules in docs/schemes.md, made from the rules themselves."""

import inspect
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from rezero_jax.formatting import markdown_table
from rezero_jax.models.transformer.layer import EncoderLayer
from rezero_jax.residual import RULES, Place
from rezero_jax.training import cost

WIDTH, HEADS, LAYERS = 256, 4, 12
HEAD = ("name", "rule", "initial values", "parameters", "operations", "source", "reference code")


def table() -> str:
    """Each rule's equation, initial values, costs and sources, in Markdown.

    The costs are the parameters of an encoder layer of WIDTH, and the floating-point operations of
    its forward pass for each position, minus the costs of a layer under `residual`.
    """
    parameters, operations = _costs("residual")
    rows: list[Sequence[str]] = [HEAD]
    for name, rule in RULES.items():
        own_parameters, own_operations = _costs(name)
        rows.append(
            (
                f"`{name}`",
                (inspect.getdoc(rule) or "").splitlines()[0].rstrip("."),
                rule.reference.start,
                f"{own_parameters - parameters:,}",
                f"{_few_digits(own_operations - operations):,}",
                rule.reference.paper,
                rule.reference.code,
            )
        )
    return markdown_table(rows)


def _few_digits(count: int) -> int:
    """Above 10,000 to three digits: what JAX makes of an equation differs between its versions."""
    return count if count < 10_000 else round(count, 3 - len(str(count)))


def _costs(rule: str) -> tuple[int, int]:
    """Parameters of an encoder layer, and its operations for each position."""
    place = Place(1, LAYERS)
    layer = nnx.eval_shape(
        lambda: EncoderLayer(
            WIDTH, HEADS, residual=rule, attention="plain", place=place, rngs=nnx.Rngs(0)
        )
    )
    graphdef, state = nnx.split(layer)
    x = jax.eval_shape(RULES[rule].enter, jax.ShapeDtypeStruct((1, 1, WIDTH), jnp.float32))
    operations = cost.flops(
        lambda state, x: nnx.merge(graphdef, state)(x), state, x, everything=True
    )
    sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    return sum(sizes), operations
