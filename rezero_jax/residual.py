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

For inference a gate can be folded: `fold_into` multiplies alpha into the branch's last weights
(`rezero_jax.models.fold` does so for a whole model).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.errors import UserError, choose_from

Branch = Callable[[Array], Array]
Activation = Callable[[Array], Array]
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
GATES = ("rezero", "gated", "layerscale")  # the rules that have an alpha


class Alpha(nnx.Param):
    """The type of every gate: optimizer groups, logging and tests find gates by it."""


class Rule(nnx.Module):
    """How a branch joins the trunk: maps x of shape (..., features) to the same shape and dtype."""

    def __call__(self, x: Array, f: Branch) -> Array:
        """Returns x' for the trunk `x` and the branch `f`, which must keep the shape of `x`."""
        raise NotImplementedError

    def fold_into(self, *ends: Any) -> "Rule":
        """Multiplies the gate, if there is one, into the branches' last weights.

        Args:
          *ends: what the branches end in: see `last_weights`.

        Returns:
          The rule by which they are to be joined from now on.

        Raises:
          UserError: the gate cannot be folded, or the last weights of an end are unknown.
        """
        return self

    def folded_relu(self) -> Activation:
        """r with r(alpha z) = alpha relu(z): after `fold_into`, the ReLU that ends a branch."""
        return nnx.relu


class Plain(Rule):
    """x' = F(x)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return _branch(f, x, x)


class Residual(Rule):
    """x' = x + F(x)."""

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + _branch(f, x, x).astype(x.dtype)


class Gate(Rule):
    """x' = x + alpha F(x): ReZero for a scalar alpha, LayerScale for one alpha per channel."""

    def __init__(self, shape: tuple[int, ...] = (), alpha_init: float = 0.0):
        self.alpha = Alpha(jnp.full(shape, alpha_init, jnp.float32))
        self.axes = len(shape)  # of one layer's alpha; a stack puts its layer axis before them

    def __call__(self, x: Array, f: Branch) -> Array:
        fx = _branch(f, x, x)
        return x + (self._along(fx) * fx).astype(x.dtype)

    def fold_into(self, *ends: Any) -> Rule:
        for weight in [weight for end in ends for weight in last_weights(end)]:
            if weight is not None:
                weight[...] = (weight[...] * self._along(weight)).astype(weight.dtype)
        return Residual()

    def folded_relu(self) -> Activation:
        return SignedRelu(self.alpha[...])

    def _along(self, y: Array | nnx.Param) -> Array:
        """alpha, ready to be multiplied with a branch's output or with (stacked) weights."""
        shape, layers = self.alpha.shape, self.alpha.ndim - self.axes
        ones = (1,) * (y.ndim - self.alpha.ndim)
        return self.alpha[...].reshape(shape[:layers] + ones + shape[layers:])


class Gated(Gate):
    """x' = (1 - alpha) x + alpha F(x): the gate opens the branch and closes the trunk."""

    def __call__(self, x: Array, f: Branch) -> Array:
        fx = _branch(f, x, x)
        alpha = self._along(fx)
        return ((1 - alpha) * x + alpha * fx).astype(x.dtype)

    def fold_into(self, *ends: Any) -> Rule:
        raise UserError(
            "the gate of `gated` scales the trunk as well as the branch, so it cannot be folded "
            "into weights; use the model as it is"
        )


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
        join = Residual() if self.alpha is None else super().__call__
        return join(x, lambda trunk: self.f(trunk, *args, **kwargs))

    def fold_gates(self) -> None:
        """Moves alpha into the last weights of f; see `rezero_jax.models.fold`."""
        self.fold_into(self.f)
        self.alpha = None  # type: ignore[assignment]


class SignedRelu(nnx.Module):
    """max(z, 0) where alpha >= 0, min(z, 0) where alpha < 0: alpha relu(z) is this of alpha z.

    It is written as a clip, whose bounds a stack can scan over.
    """

    def __init__(self, alpha: Array):
        self.low = nnx.Variable(jnp.where(alpha < 0, -jnp.inf, 0.0))
        self.high = nnx.Variable(jnp.where(alpha < 0, 0.0, jnp.inf))

    def __call__(self, z: Array) -> Array:
        low, high = (
            bound[...].astype(z.dtype).reshape((1,) * (z.ndim - bound.ndim) + bound.shape)
            for bound in (self.low, self.high)
        )
        return jnp.clip(z, low, high)


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
            return Gated((), alpha_init)
        case "layerscale":
            return Gate((features,), alpha_init)
    raise choose_from("residual rule", name, RULES)


def last_weights(end: Any) -> tuple[nnx.Param | None, ...]:
    """The parameters that, all multiplied by a number, multiply what a branch ends in by it.

    Their last axis is that of the channels. None stands for a bias that is not there.

    Args:
      end: a linear layer or convolution of Flax, an nnx.Sequential that ends in one, a parameter,
        or an object with a method `last_weights()`, which is asked.

    Raises:
      UserError: it is something else.
    """
    if isinstance(end, nnx.Param):
        return (end,)
    if type(end) in (nnx.Linear, nnx.LinearGeneral, nnx.Conv):  # a subclass may do more
        return end.kernel, end.bias
    if type(end) is nnx.Sequential:
        return last_weights(end.layers[-1])
    if hasattr(end, "last_weights"):
        return end.last_weights()
    raise UserError(
        f"the last weights of a branch that is or ends in a {type(end).__name__} are unknown, so "
        "no gate can be folded into them; make it a module with a method last_weights() that "
        "returns what its output is proportional to, such as (self.out.kernel, self.out.bias)"
    )


def _branch(f: Callable[..., Array], x: Array, trunk: Array) -> Array:
    fx = f(x)
    if fx.shape != trunk.shape:
        raise ValueError(
            f"a residual branch must keep the shape of the trunk, but it maps {trunk.shape} to "
            f"{fx.shape}"
        )
    return fx
