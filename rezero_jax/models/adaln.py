"""adaLN-Zero, the conditioned block of diffusion Transformers (DiT, arXiv 2212.09748, figure 3)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from rezero_jax.residual import apply

EPSILON = 1e-6  # as in the authors' norm


class AdaLNZero(nnx.Module):
    """Wraps a module or function f as x -> x + g(c) f((1 + s(c)) LN(x) + b(c), ...).

    Shift b, scale s and gate g, one per channel, are one linear map of silu(c) that starts at zero,
    so at initialisation the wrapped layer is the identity to the bit. As with `ReZero`, the gate
    moves first: do not zero-initialise f's last layer as well. The norm is float32, without
    parameters. A DiT block is two of these modules, around attention and around a feed-forward.

    Args:
      f: the branch; its output has the shape of its first argument.
      features: size of the last axis of x.
      condition: size of the last axis of c.
      rngs: source of the initial parameters, which are zeros.

    Raises (when called):
      ValueError: f's output has another shape than x.
    """

    def __init__(self, f: Callable[..., Array], features: int, condition: int, *, rngs: nnx.Rngs):
        self.f = f
        self.norm = nnx.LayerNorm(
            features, epsilon=EPSILON, use_bias=False, use_scale=False, rngs=rngs
        )
        self.modulation = nnx.Linear(
            condition, 3 * features, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "batch *places features"],
        c: Float[Array, "batch condition"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "batch *places features"]:
        """Returns x after the layer; `args` and `kwargs` are further arguments of f."""
        modulation = self.modulation(nnx.silu(c)).reshape(len(c), *(1,) * (x.ndim - 2), -1)
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        normed = (1 + scale) * self.norm(x.astype(jnp.float32)) + shift
        fx = apply(lambda u: self.f(u, *args, **kwargs), normed.astype(x.dtype), x)
        return x + (gate * fx).astype(x.dtype)
