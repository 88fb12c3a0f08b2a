"""ReZero: x' = x + alpha F(x), and the other rules that place no norm."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.residual.rule import About, Branch, Rule, Site, apply

TRUNK_DTYPE = jnp.float32  # the least that a model's trunk has


class Alpha(nnx.Param):
    """The type of every gate: optimizer groups, logging and tests find gates by it."""


def scale(alpha: Array, y: Array) -> Array:
    """alpha y, for one alpha () or one per channel (features,): all that any gate ever does."""
    return alpha.reshape((1,) * (y.ndim - alpha.ndim) + alpha.shape) * y


def trunk_dtype(dtype: Any) -> Any:
    """The dtype of a model's trunk where it computes in `dtype`."""
    return jnp.promote_types(dtype, TRUNK_DTYPE)


class ReZero(nnx.Module):
    """Wraps a module or function f as x -> x + alpha f(x, ...), with alpha 0 at the start (eq. 1).

    At initialisation the wrapped layer is the identity to the bit; the gradient of the loss with
    respect to alpha is <dL/dx', f(x)>, and f's own parameters first move at the second update. So
    do not zero-initialise f's last layer as well: then nothing would ever move.

    Args:
      f: the branch; its output has the shape of its first argument.
      alpha_init: the gate's initial value.

    Raises (when called):
      ValueError: f's output has another shape than x.
    """

    def __init__(self, f: Callable[..., Array], alpha_init: float = 0.0):
        self.alpha = Alpha(jnp.full((), alpha_init, jnp.float32))
        self.f = f

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        fx = apply(lambda trunk: self.f(trunk, *args, **kwargs), x, x)
        return x + scale(self.alpha[...], fx).astype(x.dtype)


class Plain(Rule):
    """x' = F(x)."""

    about = About("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return apply(f, x, x).astype(x.dtype)


class Residual(Rule):
    """x' = x + F(x)."""

    about = About("", "arXiv 1512.03385, eq. 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + apply(f, x, x).astype(x.dtype)


class GatedRule(Rule):
    """A rule with a gate, 0 at the start unless `alpha_init` says otherwise."""

    per_channel = False

    def __init__(self, site: Site):
        shape = (site.features,) if self.per_channel else ()
        start = self.alpha_start(site) if site.alpha_init is None else site.alpha_init
        self.alpha = Alpha(jnp.full(shape, start, jnp.float32))

    def alpha_start(self, site: Site) -> float:
        """The rule's own initial gate."""
        return 0.0


class ReZeroRule(GatedRule):
    """x' = x + alpha F(x)."""

    about = About("alpha 0", "arXiv 2003.04887, eq. 1", "majumderb/rezero")

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + scale(self.alpha[...], apply(f, x, x)).astype(x.dtype)


class ReZeroChannel(ReZeroRule):
    """x' = x + alpha * F(x), one alpha per channel."""

    about = About("alpha 0", "arXiv 2003.04887, eq. 1, per channel", "")
    per_channel = True


class Gated(GatedRule):
    """x' = (1 - alpha) x + alpha F(x).

    The gate opens the branch and closes the trunk.
    """

    about = About("alpha 0", "arXiv 2003.04887, section 2.3", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        fx, alpha = apply(f, x, x), self.alpha[...]
        return (scale(1 - alpha, x) + scale(alpha, fx)).astype(x.dtype)
