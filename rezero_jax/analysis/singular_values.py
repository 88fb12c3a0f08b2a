"""Singular values of a network's input-output Jacobian (paper, eq. 3 and Figure 4).

f maps a batch (batch, ...) to a batch, as models do, and J is the Jacobian of one example with its
axes flattened: (outputs, inputs). f must map each example independently, so call `model.eval()` if
the model has BatchNorm. The paper's figures show log10 of the values, the authors' notebooks the
mean of their squares. Modules of the same structure share compiled code.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from rezero_jax.analysis.statistics import Estimate

AnyArray = Array | np.ndarray
Function = Callable[[Array], Array]

ROWS_AT_ONCE = 64  # batch size of the rows of a Jacobian


def jacobian(f: Function, x: Float[AnyArray, "..."]) -> Float[Array, "outputs inputs"]:
    """J of f at one example x, without a batch axis; by rows or columns, whichever are fewer."""
    return _jacobian(_traceable(f), x)


def singular_values(
    f: Function, x: Float[AnyArray, "batch ..."]
) -> Float[np.ndarray, "batch values"]:
    """All min(outputs, inputs) singular values of each example's J, descending, float64.

    One Jacobian is in memory at a time. With a float32 f, values below 1e-7 of the largest are
    noise. For more precision, use `jax.enable_x64(True)`, float64 parameters and a float64 x.

    Examples:
      >>> from rezero_jax.analysis.singular_values import singular_values
      >>> block = ReZero(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> assert (singular_values(block, jnp.ones((4, 16))) == 1).all()
    """
    matrices = (np.asarray(jacobian(f, example), np.float64) for example in np.asarray(x))
    return np.stack([np.linalg.svd(matrix, compute_uv=False) for matrix in matrices])


def mean_squared_singular_value(
    f: Function, x: Float[AnyArray, "batch ..."], *, probes: int = 32, key: Array
) -> Estimate:
    """Hutchinson estimate of the mean squared singular value, over the examples x.

    The sum of squares is |J|^2 = E |J^T u|^2 for u uniform on the sphere |u|^2 = outputs; the mean
    divides it by min(outputs, inputs). A probe costs one backward pass, and is exact if all
    singular values are equal. The standard error covers the probes, not the examples.

    Examples:
      >>> from rezero_jax.analysis.singular_values import mean_squared_singular_value
      >>> block = ReZero(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> estimate = mean_squared_singular_value(block, jnp.ones((4, 16)), key=jax.random.key(0))
    """
    compute = _traceable(f)
    outputs, inputs = (a.size // len(x) for a in (jax.eval_shape(compute, x), x))
    norms = np.asarray(_probe_norms(compute, x, jax.random.split(key, probes)), np.float64)
    return Estimate.of((norms**2).mean(axis=1) / min(outputs, inputs))


def safe_norms(x: Float[AnyArray, "batch ..."]) -> Float[Array, " batch"]:
    """|x| of every example in float32 or wider, without overflow or underflow of the squares."""
    flat = x.reshape(len(x), -1).astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.abs(flat).max(axis=1, keepdims=True)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jnp.linalg.norm(flat / scale, axis=1) * scale[:, 0]


@jax.jit
def _jacobian(f: Partial, x: Array) -> Array:
    def flat(v: Array) -> Array:
        return f(v.reshape(1, *x.shape)).ravel()

    def row(u: Array) -> Array:
        return pull(u)[0]

    y, pull = jax.vjp(flat, x.ravel())
    if y.size <= x.size:
        return jax.lax.map(row, jnp.eye(y.size, dtype=y.dtype), batch_size=ROWS_AT_ONCE)
    # jax.jvp would fail for a function with a custom gradient, such as our convolution.
    push = jax.linear_transpose(row, y)
    columns = jnp.eye(x.size, dtype=x.dtype)
    return jax.lax.map(lambda v: push(v)[0], columns, batch_size=ROWS_AT_ONCE).T


@jax.jit
def _probe_norms(f: Partial, x: Array, keys: Array) -> Float[Array, "probes batch"]:
    y, pull = jax.vjp(f, x)

    def norms(key: Array) -> Array:
        u = jax.random.normal(key, y.shape, y.dtype).reshape(len(y), -1)
        u = u * (math.sqrt(u.shape[1]) / jnp.linalg.norm(u, axis=1, keepdims=True))
        return safe_norms(pull(u.reshape(y.shape))[0])

    return jax.lax.map(norms, keys)


def _traceable(f: Function) -> Partial:
    if isinstance(f, nnx.Module):
        return Partial(_call, f)
    return f if isinstance(f, Partial) else Partial(f)


def _call(model: Any, x: Array) -> Array:
    # A copy, because a derivative may not write to the module.
    return nnx.clone(model)(x)
