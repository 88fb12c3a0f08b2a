"""The kinds of norm that a rule may place."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.errors import choose_from


class DyT(nnx.Module):
    """gamma tanh(a x) + beta with a scalar a = 0.5 at first, in place of a norm.

    Dynamic Tanh, arXiv 2503.10622, section 4 and algorithm 1.
    """

    def __init__(self, features: int, dtype: Any = None):
        self.dtype = dtype
        self.a = nnx.Param(jnp.full((), 0.5, jnp.float32))
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        last = (1,) * (x.ndim - 1) + (-1,)
        y = self.scale[...].reshape(last) * jnp.tanh(self.a[...] * x) + self.bias[...].reshape(last)
        return y if self.dtype is None else y.astype(self.dtype)


NORMS = ("layer_norm", "dyt")


def make_norm(
    name: str, features: int, *, dtype: Any = None, rngs: nnx.Rngs
) -> Callable[[Array], Array]:
    """The norm called `name`: "layer_norm", with PyTorch's epsilon, or "dyt".

    Args:
      dtype: of the output; by default float32.

    Raises:
      UserError: no norm is called `name`.
    """
    if name not in NORMS:
        raise choose_from("norm", name, NORMS)
    if name == "dyt":
        return DyT(features, dtype)
    return nnx.LayerNorm(features, epsilon=1e-5, dtype=dtype, rngs=rngs)
