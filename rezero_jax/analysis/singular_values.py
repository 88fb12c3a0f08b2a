"""Singular values of a network's input-output Jacobian (paper, eq. 3 and Figure 4).

f maps a batch (batch, ...) to a batch, as models do, and J is the Jacobian of one example with its
axes flattened: (outputs, inputs). f must map each example on its own, so call `model.eval()` if the
model has BatchNorm. The paper's figures and the authors' notebooks show

    values = singular_values(model, x)          # (batch, min(outputs, inputs)), descending
    np.log10(values), (values**2).mean()        # the histogram, the "mean squared singular value"

If J is too large, `mean_squared_singular_value` estimates the mean of squares, and
`top_singular_values` finds the largest values, each with its error.

A module is an argument of the compiled functions, so a second module of the same structure compiles
nothing. With a compiled constructor too, the notebook's Transformers at initialisation are

    make = jax.jit(lambda key: Encoder(16, 4, 128, feedforward=64, rngs=nnx.Rngs(key), ...))
    [singular_values(make(key), jax.random.normal(key, (1, 4, 16))) for key in keys]
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from rezero_jax.analysis.statistics import Estimate
from rezero_jax.errors import UserError

AnyArray = Array | np.ndarray
Function = Callable[[Array], Array]

ROWS_AT_ONCE = 64  # rows of a Jacobian that are computed together
OVERSAMPLING = 8  # directions of a subspace iteration in addition to the k requested


def jacobian(f: Function, x: Float[AnyArray, "..."]) -> Float[Array, "outputs inputs"]:
    """J of f at one example x without a batch axis.

    J is computed by rows or by columns, whichever are fewer. Columns are the transpose of the
    backward pass, so that functions with a custom gradient have columns too.
    """
    return _jacobian(_traceable(f), x)


def singular_values(
    f: Function, x: Float[AnyArray, "batch ..."], *, float64: bool = False
) -> Float[np.ndarray, "batch values"]:
    """All min(outputs, inputs) singular values of each example's J, descending, float64.

    One Jacobian is in memory at a time. The decomposition is float64, but J is only as exact as f:
    in float32, values below 1e-7 of the largest are noise.

    Args:
      f: maps a batch to a batch.
      x: the examples.
      float64: computes J in float64 too. A module is copied with float64 parameters and `dtype`
        attributes; any other function gets a float64 x. A part with a fixed float32, such as the
        softmax of attention, stays float32.
    """
    with jax.enable_x64(float64):
        compute = _traceable(_in_float64(f) if float64 else f)
        dtype = jnp.float64 if float64 else None
        matrices = (_jacobian(compute, jnp.asarray(example, dtype)) for example in np.asarray(x))
        return np.stack(
            [np.linalg.svd(np.asarray(m, np.float64), compute_uv=False) for m in matrices]
        )


def mean_squared_singular_value(
    f: Function, x: Float[AnyArray, "batch ..."], *, probes: int = 32, key: Array
) -> Estimate:
    """The mean of the squares of all singular values, over the examples x, without the matrix.

    The sum of squares is |J|^2 = E |J^T u|^2 for u uniform on the sphere |u|^2 = outputs
    (Hutchinson), at the cost of one backward pass per draw. A draw is exact if all singular values
    are equal. The mean divides the sum by min(outputs, inputs).

    Returns:
      The mean over `probes` draws; its standard error covers the draws, not the examples.
    """
    compute = _traceable(f)
    norms = np.asarray(_probe_norms(compute, x, jax.random.split(key, probes)), np.float64)
    return Estimate.of((norms**2).mean(axis=1) / _count(compute, x))


class Top(NamedTuple):
    """The largest singular values of each example's Jacobian.

    Attributes:
      values: descending, float64 (batch, k).
      errors: J has a singular value within this distance of each value, float64 (batch, k).
    """

    values: np.ndarray
    errors: np.ndarray


def top_singular_values(
    f: Function, x: Float[AnyArray, "batch ..."], k: int, *, iterations: int = 4, key: Array
) -> Top:
    """The k largest singular values of each example's J, by randomised subspace iteration.

    Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4 with 8 additional directions; each
    iteration takes k + 8 forward and k + 8 backward products. For an approximate triple with
    J^T u = s v, |J v - s u| / sqrt(2) bounds the distance from s to the nearest singular value.

    Raises:
      UserError: k is not in 1 .. min(outputs, inputs).
    """
    most = _count(_traceable(f), x)
    if not 1 <= k <= most:
        raise UserError(f"J has no k={k} singular values; choose 1 to {most}")
    directions = min(k + OVERSAMPLING, most)
    compute = partial(_top, _traceable(f), directions=directions, iterations=iterations)
    keys = jax.random.split(key, len(x))
    pairs = [compute(example, one) for example, one in zip(x, keys, strict=True)]
    values, errors = (np.stack([np.asarray(p[i], np.float64)[:k] for p in pairs]) for i in (0, 1))
    return Top(values, errors)


@jax.jit
def _jacobian(f: Partial, x: Array) -> Array:
    pull, push, outputs = _products(f, x)
    if outputs <= x.size:
        return jax.lax.map(pull, jnp.eye(outputs, dtype=x.dtype), batch_size=ROWS_AT_ONCE)
    return jax.lax.map(push, jnp.eye(x.size, dtype=x.dtype), batch_size=ROWS_AT_ONCE).T


@jax.jit
def _probe_norms(f: Partial, x: Array, keys: Array) -> Array:
    """|J^T u| of every probe and example, (probes, batch)."""
    y, pull = jax.vjp(f, x)

    def norms(key: Array) -> Array:
        u = jax.random.normal(key, y.shape, y.dtype).reshape(len(y), -1)
        u = u * (np.sqrt(u.shape[1]) / jnp.linalg.norm(u, axis=1, keepdims=True))
        return safe_norms(pull(u.reshape(y.shape))[0])

    return jax.lax.map(norms, keys)


@partial(jax.jit, static_argnames=("directions", "iterations"))
def _top(
    f: Partial, x: Array, key: Array, *, directions: int, iterations: int
) -> tuple[Array, Array]:
    pull, push, _ = _products(f, x)
    v = jax.random.normal(key, (directions, x.size), x.dtype)

    def orthonormal(rows: Array) -> Array:
        return jnp.linalg.qr(rows.T)[0].T

    def iterate(_: Array, v: Array) -> Array:
        return orthonormal(jax.lax.map(pull, orthonormal(jax.lax.map(push, v))))

    v = jax.lax.fori_loop(0, iterations, iterate, orthonormal(v))
    q = orthonormal(jax.lax.map(push, v))
    left, values, right = jnp.linalg.svd(jax.lax.map(pull, q), full_matrices=False)
    residual = jax.lax.map(push, right) - values[:, None] * (left.T @ q)
    return values, jnp.linalg.norm(residual, axis=1) / np.sqrt(2)


def _products(f: Partial, x: Array) -> tuple[Function, Function, int]:
    """u -> J^T u and v -> J v on flat vectors of one example, and the number of outputs."""

    def flat(v: Array) -> Array:
        return f(v.reshape(1, *x.shape)).ravel()

    y, pull = jax.vjp(flat, x.ravel())

    def backward(u: Array) -> Array:
        return pull(u)[0]

    # Not jax.jvp: a function with a custom gradient, such as our convolution, has no forward mode.
    forward = jax.linear_transpose(backward, y)
    return backward, lambda v: forward(v)[0], y.size


def _count(f: Partial, x: AnyArray) -> int:
    """Number of singular values of one example's J."""
    outputs = jax.eval_shape(f, x).size // len(x)
    return min(outputs, x.size // len(x))


def safe_norms(x: Float[AnyArray, "batch ..."]) -> Float[Array, " batch"]:
    """|x| of every example, float32 or wider, even if squares would over- or underflow."""
    flat = x.reshape(len(x), -1)
    flat = flat.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.abs(flat).max(axis=1, keepdims=True)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jnp.linalg.norm(flat / scale, axis=1) * scale[:, 0]


def _traceable(f: Function) -> Partial:
    """f as an argument of a compiled function."""
    if isinstance(f, nnx.Module):
        return Partial(_call, f)
    return f if isinstance(f, Partial) else Partial(f)


def _call(model: Any, x: Array) -> Array:
    # A copy, because a derivative may not write to the module.
    return nnx.clone(model)(x)


def _in_float64(f: Function) -> Function:
    if not isinstance(f, nnx.Module):
        return f
    twin = nnx.clone(f)
    for _, module in nnx.iter_modules(twin):
        if getattr(module, "dtype", None) == jnp.float32:
            module.dtype = jnp.float64  # type: ignore[attr-defined]
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, twin
    )
