"""What an update costs: its floating-point operations, and what accelerators can do of them."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from rezero_jax.errors import choose_from


class Accelerator(NamedTuple):
    """What one chip can do, by its maker's data sheet.

    Attributes:
      kind: beginning of JAX's `device_kind`.
      flops: bfloat16 operations a second at best, matrix products without sparsity.
      float32: the same of float32 numbers, as JAX multiplies them unless it is told otherwise: on a
        TPU as bfloat16, on these GPUs as TensorFloat-32.
      memory: bytes.
    """

    kind: str
    flops: float
    float32: float
    memory: float

    def peak(self, dtype: str) -> float:
        """Operations a second at best of a model that computes in `dtype`."""
        return self.float32 if dtype == "float32" else self.flops


ACCELERATORS = {
    "v4": Accelerator("TPU v4", 275e12, 275e12, 32e9),
    "v5e": Accelerator("TPU v5 lite", 197e12, 197e12, 16e9),
    "v5p": Accelerator("TPU v5", 459e12, 459e12, 95e9),
    "v6e": Accelerator("TPU v6", 918e12, 918e12, 32e9),
    "a100": Accelerator("NVIDIA A100", 312e12, 156e12, 80e9),
    "h100": Accelerator("NVIDIA H100", 989e12, 494e12, 80e9),
    "h200": Accelerator("NVIDIA H200", 989e12, 494e12, 141e9),
}


def named(name: str) -> Accelerator:
    """The accelerator of this name.

    Raises:
      UserError: it is not one of ACCELERATORS.
    """
    if name not in ACCELERATORS:
        raise choose_from("accelerator", name, ACCELERATORS)
    return ACCELERATORS[name]


def accelerator() -> Accelerator | None:
    """The one that this process runs on, if its data sheet is known here."""
    kind = jax.devices()[0].device_kind
    fitting = [one for one in ACCELERATORS.values() if kind.startswith(one.kind)]
    return max(fitting, key=lambda one: len(one.kind), default=None)


def flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in function(*args).

    Each multiplication and each addition counts; a scan's body counts for each of its turns, of
    several branches the costliest counts, and a loop of unknown length is one turn.

    Args:
      *args: arrays or their shapes; nothing is computed.
    """
    return _total(jax.make_jaxpr(function)(*args).jaxpr)


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
