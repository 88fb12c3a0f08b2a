"""What an update costs in floating-point operations."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in function(*args).

    Each multiplication and each addition counts; a scan's body counts for each of its turns, of
    several branches the costliest counts, and a loop of unknown length is one turn.

    Args:
      *args: arrays or their shapes; nothing is computed.
    """
    # A new function, as JAX would give back an old trace, perhaps not of `devices.counting`.
    return _total(jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr)


def _total(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            total += _operations(equation)
        else:
            inner = [_total(sub) for sub in _inner(equation)]
            turns = equation.params["length"] if name == "scan" else 1
            total += turns * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _operations(equation: core.JaxprEqn) -> int:
    arrays: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
    left, right, out = (array.shape for array in arrays)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        terms = math.prod(left[axis] for axis in contracted)
    else:
        out_features = right[equation.params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(right) // out_features
    return 2 * terms * math.prod(out)


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The functions within an operation."""
    for value in jax.tree.leaves(equation.params):
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
