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
one layer can share a gate. The trunk keeps its dtype, and a model's is float32 even where it
computes in bfloat16: a bfloat16 sum keeps 8 bits, and loses alpha F(x) while alpha is small. To
gate a module of your own, wrap it: `ReZero(f)`. For inference,
`rezero_jax.models.fold` multiplies the gates into the weights.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.errors import choose_from

Branch = Callable[[Array], Array]

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
        self.alpha = Alpha(jnp.full((), alpha_init, jnp.float32))  # None once folded
        self.f = f

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        fx = _branch(lambda trunk: self.f(trunk, *args, **kwargs), x, x)
        return x + (fx if self.alpha is None else scale(self.alpha[...], fx)).astype(x.dtype)


class Rule(nnx.Module):
    """How a branch joins the trunk: maps x of shape (..., features) to the same shape and dtype."""

    def __call__(self, x: Array, f: Branch) -> Array:
        """Returns x' for the trunk `x` and the branch `f`, which must keep the shape of `x`."""
        raise NotImplementedError


class Plain(Rule):
    """x' = F(x)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return _branch(f, x, x).astype(x.dtype)


class Residual(Rule):
    """x' = x + F(x)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + _branch(f, x, x).astype(x.dtype)


class GatedRule(Rule):
    """A rule with a gate."""

    def __init__(self, alpha_init: float = 0.0, shape: tuple[int, ...] = ()):
        self.alpha = Alpha(jnp.full(shape, alpha_init, jnp.float32))


class ReZeroRule(GatedRule):
    """x' = x + alpha F(x)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + scale(self.alpha[...], _branch(f, x, x)).astype(x.dtype)


class LayerScale(ReZeroRule):
    """x' = x + alpha F(x) with one alpha per channel."""

    def __init__(self, features: int, alpha_init: float = 0.0):
        super().__init__(alpha_init, (features,))


class Gated(GatedRule):
    """x' = (1 - alpha) x + alpha F(x): the gate opens the branch and closes the trunk."""

    def __call__(self, x: Array, f: Branch) -> Array:
        fx, alpha = _branch(f, x, x), self.alpha[...]
        return (scale(1 - alpha, x) + scale(alpha, fx)).astype(x.dtype)


class Normed(Rule):
    """A rule with a float32 LayerNorm that has PyTorch's epsilon, as in the authors' code."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, rngs=rngs)


class Norm(Normed):
    """x' = Norm(F(x))."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(_branch(f, x, x)).astype(x.dtype)


class PreNorm(Normed):
    """x' = x + F(Norm(x))."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + _branch(f, self.norm(x), x)).astype(x.dtype)


class PostNorm(Normed):
    """x' = Norm(x + F(x))."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(x + _branch(f, x, x)).astype(x.dtype)


class GPT2Norm(Normed):
    """x' = x + Norm(F(x)), the paper's "GPT2-Norm" (the GPT-2 model itself is pre-norm)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.norm(_branch(f, x, x))).astype(x.dtype)


GATES = ("rezero", "gated", "layerscale")  # the rules that have an alpha
NORMED = {"norm": Norm, "pre_norm": PreNorm, "post_norm": PostNorm, "gpt2_norm": GPT2Norm}
RULES = ("plain", "residual", *NORMED, *GATES)


def make_rule(name: str, features: int, *, alpha_init: float = 0.0, rngs: nnx.Rngs) -> Rule:
    """The rule called `name`.

    Args:
      name: one of RULES.
      features: size of the trunk's last axis.
      alpha_init: initial gate of `rezero`, `gated` and `layerscale`; the other rules have none.

    Raises:
      UserError: no rule is called `name`.
    """
    match name:
        case "plain":
            return Plain()
        case "residual":
            return Residual()
        case "rezero":
            return ReZeroRule(alpha_init)
        case "gated":
            return Gated(alpha_init)
        case "layerscale":
            return LayerScale(features, alpha_init)
    if name not in NORMED:
        raise choose_from("residual rule", name, RULES)
    return NORMED[name](features, rngs=rngs)


def _branch(f: Branch, x: Array, trunk: Array) -> Array:
    fx = f(x)
    if fx.shape != trunk.shape:
        raise ValueError(
            f"a residual branch must keep the shape of the trunk, but it maps {trunk.shape} to "
            f"{fx.shape}"
        )
    return fx
