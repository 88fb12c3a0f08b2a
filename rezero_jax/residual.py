"""The idea: one scalar gate per residual branch, starting at zero; and every rule it competes with.

A *rule* says how the output of a branch F joins the trunk x. Table 1 of the paper lists seven:

    plain       x' = F(x)
    residual    x' = x + F(x)
    norm        x' = Norm(F(x))
    pre_norm    x' = x + F(Norm(x))
    post_norm   x' = Norm(x + F(x))
    gpt2_norm   x' = x + Norm(F(x))
    rezero      x' = x + alpha F(x)        alpha a learned scalar, 0 at the start (eq. 1)

`gated` (section 2.3) is x' = (1 - alpha) x + alpha F(x) with the same alpha, the paper's "Gated" or
"Highway" network; `layerscale` (CaiT, arXiv 2103.17239) is ReZero with one alpha per channel.

Each rule is a module called with the trunk and the branch, `rule(x, f)`, so that the sublayers of
one layer can share a gate. To gate a module of your own, wrap it: `ReZero(f)`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.errors import choose_from

Branch = Callable[[Array], Array]
LAYER_NORM = partial(nnx.LayerNorm, epsilon=1e-5)

RULES = (
    "plain",
    "residual",
    "norm",
    "pre_norm",
    "post_norm",
    "gpt2_norm",
    "rezero",
    "gated",
    "layerscale",
)


class Alpha(nnx.Param):
    """The type of every gate: optimizer groups, logging and tests find gates by it."""


class Rule(nnx.Module):
    """How a branch joins the trunk: maps x of shape (..., features) to the same shape and dtype."""

    def __call__(self, x: Array, f: Branch) -> Array:
        """Returns x' for the trunk `x` and the branch `f`, which must keep the shape of `x`."""
        raise NotImplementedError


class Plain(Rule):
    """x' = F(x)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return _branch(f, x, x)


class Residual(Rule):
    """x' = x + F(x)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + _branch(f, x, x)


class Gate(Rule):
    """x' = x + alpha F(x): ReZero for a scalar alpha, LayerScale for one alpha per channel."""

    def __init__(self, shape: tuple[int, ...] = (), alpha_init: float = 0.0):
        self.alpha = Alpha(jnp.full(shape, alpha_init, jnp.float32))

    def __call__(self, x: Array, f: Branch) -> Array:
        fx = _branch(f, x, x)
        return x + (self._alpha(fx) * fx).astype(x.dtype)

    def _alpha(self, fx: Array) -> Array:
        return self.alpha[...].reshape((1,) * (fx.ndim - self.alpha.ndim) + self.alpha.shape)


class Convex(Gate):
    """x' = (1 - alpha) x + alpha F(x): the gate opens the branch and closes the trunk."""

    def __call__(self, x: Array, f: Branch) -> Array:
        fx = _branch(f, x, x)
        alpha = self._alpha(fx)
        return ((1 - alpha) * x + alpha * fx).astype(x.dtype)


class Normed(Rule):
    """A rule that normalises."""

    def __init__(self, norm: Callable[[Array], Array]):
        self.norm = norm


class Norm(Normed):
    """x' = Norm(F(x))."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(_branch(f, x, x))


class PreNorm(Normed):
    """x' = x + F(Norm(x))."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + _branch(f, self.norm(x), x)


class PostNorm(Normed):
    """x' = Norm(x + F(x))."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(x + _branch(f, x, x))


class GPT2Norm(Normed):
    """x' = x + Norm(F(x)), the paper's "GPT2-Norm" (the GPT-2 model itself is pre-norm)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + self.norm(_branch(f, x, x))


class ReZero(Gate):
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
        super().__init__((), alpha_init)
        self.f = f

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:  # type: ignore[override]
        return super().__call__(x, lambda trunk: self.f(trunk, *args, **kwargs))


def make_rule(
    name: str,
    features: int,
    *,
    alpha_init: float = 0.0,
    norm: Callable[..., Any] = LAYER_NORM,
    rngs: nnx.Rngs,
) -> Rule:
    """The rule called `name`.

    Args:
      name: one of RULES.
      features: size of the trunk's last axis.
      alpha_init: initial gate of `rezero`, `gated` and `layerscale`; the other rules have none.
      norm: `norm(features, rngs=rngs)` makes the norm of the rules that have one; by default a
        LayerNorm with PyTorch's epsilon, as in the authors' code.

    Raises:
      UserError: no rule is called `name`.
    """
    match name:
        case "plain":
            return Plain()
        case "residual":
            return Residual()
        case "norm":
            return Norm(norm(features, rngs=rngs))
        case "pre_norm":
            return PreNorm(norm(features, rngs=rngs))
        case "post_norm":
            return PostNorm(norm(features, rngs=rngs))
        case "gpt2_norm":
            return GPT2Norm(norm(features, rngs=rngs))
        case "rezero":
            return Gate((), alpha_init)
        case "gated":
            return Convex((), alpha_init)
        case "layerscale":
            return Gate((features,), alpha_init)
    raise choose_from("residual rule", name, RULES)


def _branch(f: Callable[..., Array], x: Array, trunk: Array) -> Array:
    fx = f(x)
    if fx.shape != trunk.shape:
        raise ValueError(
            f"a residual branch must keep the shape of the trunk, but it maps {trunk.shape} to "
            f"{fx.shape}"
        )
    return fx
