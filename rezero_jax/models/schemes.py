"""The table of all residual rules, from the rules themselves: it stands in docs/schemes.md."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from rezero_jax.formatting import markdown_table
from rezero_jax.models.transformer.layer import EncoderLayer
from rezero_jax.residual import RULES, Place

WIDTH, HEADS, LAYERS = 256, 4, 12
# What only moves or names numbers.
FREE = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
}
HEAD = ("name", "rule", "initial values", "parameters", "operations", "source", "reference code")


def table() -> str:
    """Each rule's equation, initial values, costs and sources, in Markdown.

    The costs are parameters, and floating-point operations of a forward pass for each position,
    that an encoder layer of WIDTH has beyond one under `residual`.
    """
    parameters, operations = _cost("residual")
    rows: list[Sequence[str]] = [HEAD]
    for name, rule in RULES.items():
        own_parameters, own_operations = _cost(name)
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


def _cost(rule: str) -> tuple[int, int]:
    """Parameters of an encoder layer, and its operations for each position."""
    options: dict[str, Any] = {
        "residual": rule,
        "place": Place(1, LAYERS),
        "attention": "plain",
    }
    layer = nnx.eval_shape(lambda: EncoderLayer(WIDTH, HEADS, **options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    x = jax.eval_shape(RULES[rule].enter, jax.ShapeDtypeStruct((1, 1, WIDTH), jnp.float32))
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    return sum(sizes), _operations(jaxpr.jaxpr)


def _operations(jaxpr: core.Jaxpr) -> int:
    """Two for each product of a matrix product, else one for each number that an operation makes.

    A reduction has one for each number that it takes.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [v for v in equation.params.values() if isinstance(v, core.ClosedJaxpr)]
        if inner:
            turns = equation.params["length"] if name == "scan" else 1
            total += turns * sum(_operations(sub.jaxpr) for sub in inner)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            out: Any = equation.outvars[0].aval
            total += 2 * math.prod(left.shape[i] for i in contracted) * math.prod(out.shape)
        elif name not in FREE:
            arrays: list[Any] = equation.invars if name.startswith("reduce_") else equation.outvars
            total += math.prod(arrays[0].aval.shape)
    return total
