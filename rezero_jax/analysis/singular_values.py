"""Singular values of a network's input-output Jacobian (paper, eq. 3 and Figure 4).

Here f maps a batch (batch, ...) to a batch, as models do, and J is the Jacobian of one example with
its axes flattened: (outputs, inputs). f must map each example on its own: call `model.eval()` where
there is a BatchNorm. The paper's figures and the authors' notebooks show

    values = singular_values(model, x)          # (batch, min(outputs, inputs)), descending
    np.log10(values), (values**2).mean()        # the histogram, the "mean squared singular value"

Where J is too large, `mean_squared_singular_value` estimates that number with its error.

A module is an argument of the compiled functions, so a second one of its structure compiles
nothing. With a compiled constructor too, the notebook's Transformers at initialisation are

    make = jax.jit(lambda key: Encoder(16, 4, 128, feedforward=64, rngs=nnx.Rngs(key), ...))
    [singular_values(make(key), jax.random.normal(key, (1, 4, 16))) for key in keys]
"""

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

ROWS_AT_ONCE = 64  # of a Jacobian, computed together


def jacobian(f: Function, x: Float[AnyArray, "..."]) -> Float[Array, "outputs inputs"]:
    """J of f at the one example x, which has no batch axis.

    Computed by rows or by columns, whichever are fewer. Columns come from the transposed backward
    pass, so a function with a custom gradient has them too.
    """
    return _jacobian(_traceable(f), x)


def singular_values(
    f: Function, x: Float[AnyArray, "batch ..."], *, float64: bool = False
) -> Float[np.ndarray, "batch values"]:
    """All min(outputs, inputs) singular values of each example's J, descending, float64.

    One Jacobian is held at a time. The decomposition is float64, but J is only as exact as f: in
    float32 values below 1e-7 of the largest are noise.

    Args:
      f: maps a batch to a batch.
      x: the examples.
      float64: computes J in float64 as well, with a copy of a module whose parameters and `dtype`
        attributes are float64; any other function gets a float64 x. A part that insists on float32,
        such as the softmax of attention, stays float32.
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
    (Hutchinson), which costs a backward pass a draw; it is exact where all singular values are
    equal. Divided by their number, min(outputs, inputs).

    Returns:
      The mean over `probes` draws; its standard error is that of the draws, for these examples.
    """
    compute = _traceable(f)
    norms = np.asarray(_probe_norms(compute, x, jax.random.split(key, probes)), np.float64)
    return Estimate.of((norms**2).mean(axis=1) / _count(compute, x))


@jax.jit
def _jacobian(f: Partial, x: Array) -> Array:
    def flat(v: Array) -> Array:
        return f(v.reshape(1, *x.shape)).ravel()

    def rows(product: Callable[[Array], tuple[Array]], like: Array) -> Array:
        eye = jnp.eye(like.size, dtype=like.dtype)
        return jax.lax.map(lambda v: product(v)[0], eye, batch_size=ROWS_AT_ONCE)

    y, pull = jax.vjp(flat, x.ravel())
    if y.size <= x.size:
        return rows(pull, y)
    # Not jax.jvp: a function with a custom gradient, like our convolutions, has no forward mode.
    return rows(jax.linear_transpose(lambda u: pull(u)[0], y), x).T


@jax.jit
def _probe_norms(f: Partial, x: Array, keys: Array) -> Array:
    """|J^T u| of every probe and example, (probes, batch)."""
    y, pull = jax.vjp(f, x)

    def norms(key: Array) -> Array:
        u = jax.random.normal(key, y.shape, y.dtype).reshape(len(y), -1)
        u = u * (np.sqrt(u.shape[1]) / jnp.linalg.norm(u, axis=1, keepdims=True))
        return safe_norms(pull(u.reshape(y.shape))[0])

    return jax.lax.map(norms, keys)


def _count(f: Partial, x: AnyArray) -> int:
    """How many singular values the J of one of the examples x has."""
    outputs = jax.eval_shape(f, x).size // len(x)
    return min(outputs, x.size // len(x))


def safe_norms(x: Float[AnyArray, "batch ..."]) -> Float[Array, " batch"]:
    """|x| of every example, float32 at least, also where squares would over- or underflow."""
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
    # A copy, made where it is called: a module may not be written to from within a derivative.
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
