"""The gate `Alpha`, the wrappers `ReZero` and `AdaLNZero`, and what all residual rules share."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.nnx.variablelib import VariableMeta
from jax import Array
from jaxtyping import Float

from rezero_jax.errors import UserError, check_choice, check_sizes

Branch = Callable[[Array], Array]
TRUNK_DTYPE = jnp.float32  # a model's trunk has at least this precision
NORMS = ("layer_norm", "dyt")
RULES: dict[str, type["Rule"]] = {}  # every rule by its name; filled in residual/__init__.py


class Mark(VariableMeta):
    """Metaclass of kinds of nnx.Param that differ by metadata: `isinstance` and filters find them.

    In a Linen model, Flax would put a subclass into a collection that training loops do not update.
    """

    if not TYPE_CHECKING:

        def __call__(cls, value: Array, **metadata: Any) -> nnx.Param:
            return nnx.Param(value, kind=cls.__name__, **metadata)

    def __instancecheck__(cls, one: Any) -> bool:
        return isinstance(one, nnx.Param) and one.get_metadata("kind", None) == cls.__name__


class Alpha(nnx.Param, metaclass=Mark):
    """The kind of every gate: optimizer groups, logging and tests find gates by it.

    Examples:
      >>> stack = Stack(lambda rngs: ReZero(nnx.relu), depth=12, rngs=nnx.Rngs(0))
      >>> gates = nnx.state(stack, Alpha)  # one array of 12 numbers
    """


def align(weight: Array, ndim: int) -> Array:
    """The weight with leading axes of size 1, `ndim` axes in total."""
    return weight.reshape((1,) * (ndim - weight.ndim) + weight.shape)


def scale(alpha: Array, y: Array) -> Array:
    """alpha y, for one alpha () or one per channel (features,)."""
    return align(alpha, y.ndim) * y


def apply(f: Branch, x: Array, trunk: Array | None = None) -> Array:
    """f(x); a ValueError if its shape is not x's, a UserError if the trunk is not floating."""
    dtype = (x if trunk is None else trunk).dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise UserError(f"the trunk is {dtype}, to which no branch adds; convert it to float32")
    fx = f(x)
    if fx.shape != x.shape:
        raise ValueError(
            f"a residual branch must keep the shape of the trunk, not map {x.shape} to {fx.shape}"
        )
    return fx


class ReZero(nnx.Module):
    """Wraps a module or function f as x -> x + alpha f(x, ...), with alpha 0 at the start (eq. 1).

    The wrapped layer starts as the identity, to the bit. The gradient of the loss with respect to
    alpha is <dL/dx', f(x)>, and f's own parameters first move at the second update: do not
    zero-initialise f's last layer as well, or no parameter would ever move. A call raises a
    ValueError if f's output has another shape than x.

    Examples:
      >>> block = ReZero(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
      >>> x = jnp.ones((8, 64))
      >>> assert (block(x) == x).all()  # until alpha moves
    """

    def __init__(self, f: Callable[..., Array], alpha_init: float = 0.0):
        self.alpha = Alpha(jnp.full((), alpha_init, jnp.float32))
        self.f = f

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        fx = apply(lambda u: self.f(u, *args, **kwargs), x)
        return x + scale(self.alpha[...], fx).astype(x.dtype)


class AdaLNZero(nnx.Module):
    """Wraps a module or function f as x -> x + g(c) f((1 + s(c)) LN(x) + b(c), ...).

    The conditioned layer of diffusion Transformers (DiT, arXiv 2212.09748, figure 3); a DiT block
    is two of these modules, around attention and around a feed-forward. Shift b, scale s and gate
    g, one per channel, are one linear map of silu(c) that starts at zero, so the layer starts as
    the identity. The norm is float32, without parameters. `features` and `condition` are the sizes
    of the last axes of x and c. A call raises a ValueError if f's output has another shape than x.

    Examples:
      >>> block = AdaLNZero(nnx.relu, features=64, condition=16, rngs=nnx.Rngs(0))
      >>> assert block(jnp.ones((8, 10, 64)), c=jnp.ones((8, 16))).shape == (8, 10, 64)
    """

    def __init__(self, f: Callable[..., Array], features: int, condition: int, *, rngs: nnx.Rngs):
        self.f = f
        self.norm = nnx.LayerNorm(  # epsilon as in the authors' code
            features, epsilon=1e-6, use_bias=False, use_scale=False, rngs=rngs
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
        modulation = self.modulation(nnx.silu(c)).reshape(
            len(c), *(1,) * (x.ndim - 2), 3 * x.shape[-1]
        )
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        normed = (1 + scale) * self.norm(x.astype(jnp.float32)) + shift
        fx = apply(lambda u: self.f(u, *args, **kwargs), normed.astype(x.dtype))
        return x + (gate * fx).astype(x.dtype)


def trunk_dtype(dtype: Any) -> Any:
    """The dtype of the trunk of a model that computes in `dtype`."""
    return jnp.promote_types(dtype, TRUNK_DTYPE)


class DyT(nnx.Module):
    """gamma tanh(a x) + beta, which replaces a norm; the scalar a starts at 0.5.

    Dynamic Tanh, arXiv 2503.10622, section 4 and algorithm 1.
    """

    def __init__(self, features: int, dtype: Any = None):
        self.dtype = dtype
        self.a = nnx.Param(jnp.full((), 0.5, jnp.float32))
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        y = scale(self.scale[...], jnp.tanh(self.a[...] * x)) + align(self.bias[...], x.ndim)
        return y if self.dtype is None else y.astype(self.dtype)


@dataclass(frozen=True)
class RuleConfig:
    """Options of a residual rule.

    Attributes:
      residual: name of the rule, a key of `rezero_jax.residual.RULES`, or a subclass of `Rule`.
      alpha_init: initial gate, for a rule that has one; None is the rule's own.
      norm: kind of every norm: "layer_norm", with PyTorch's epsilon, or "dyt" (arXiv 2503.10622).
      base_depth: number of layers at which `completep` and `depth_mup` are x + F(LN x).

    Raises:
      UserError: an option is unknown or out of range.

    Examples:
      >>> config = RuleConfig("gated", alpha_init=0.1)
    """

    residual: "str | type[Rule]" = "rezero"
    alpha_init: float | None = None
    norm: str = "layer_norm"
    base_depth: int = 2

    def __post_init__(self) -> None:
        check_rule(self.residual, RULES)
        check_choice("norm", self.norm, NORMS)
        check_sizes(base_depth=self.base_depth)

    @property
    def rule(self) -> type["Rule"]:
        return RULES[self.residual] if isinstance(self.residual, str) else self.residual

    def make_norm(
        self, features: int, *, dtype: Any = None, rngs: nnx.Rngs
    ) -> Callable[[Array], Array]:
        """A norm over the last axis, of size `features`; its output is float32 or `dtype`."""
        if self.norm == "dyt":
            return DyT(features, dtype)
        return nnx.LayerNorm(features, epsilon=1e-5, dtype=dtype, rngs=rngs)


@dataclass(frozen=True)
class Place:
    """The position of a branch in a network.

    Attributes:
      layer: the branch's layer, 1 .. layers; in a scanned stack a traced int32 ().
      sublayer: index of the branch in its layer, 0 .. sublayers - 1.
    """

    layer: int | Array
    layers: int
    sublayer: int = 0
    sublayers: int = 1

    @property
    def branches(self) -> int:
        """Number of branches in the network."""
        return self.layers * self.sublayers


def required(place: Place | None) -> Place:
    """The place of a rule that depends on the depth, else a UserError."""
    if place is None:
        raise UserError("this rule depends on the depth; give place=residual.Place(layer, layers)")
    return place


class Constant(nnx.Variable):
    """An untrained number of a layer, such as a factor that depends on the layer's place."""


class Reference(NamedTuple):
    """The origin of a rule; the rule's equation is the first line of its docstring."""

    start: str  # initial values of the learned parameters, and rules by depth
    paper: str
    code: str


class Rule(nnx.Module):
    """How a branch joins the trunk: maps x of shape (..., features) to the same shape and dtype.

    A rule of several streams maps (..., streams, features) instead, and a branch sees one stream.

    Args:
      features: size of the trunk's last axis.
      place: position of the branch in the network, for the rules that depend on it.

    Attributes:
      shares_gate: whether the sublayers of a layer may share the rule's gate.
      has_norm: whether each branch has parameters of its own in addition to a gate.
      norms_branch: whether the branch sees a normalised trunk and the sum is not normalised: a
        network then ends with a norm.
      has_inner_norm: whether the sublayers have a second norm before their last matrix.
      streams: number of vectors of `features` that the trunk has at each position.
      epsilon_scale: factor of Adam's epsilon for the parameters of a stack of layers.
      rate_scale: factor of their learning rate, except under SGD.
    """

    reference: ClassVar[Reference]
    shares_gate: ClassVar[bool] = False
    has_norm: ClassVar[bool] = False
    norms_branch: ClassVar[bool] = False
    has_inner_norm: ClassVar[bool] = False
    streams: ClassVar[int] = 1
    epsilon_scale: float = 1.0
    rate_scale: float = 1.0

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        pass

    def __call__(self, x: Array, f: Branch) -> Array:
        """Returns x' for the trunk `x` and the branch `f`, which must keep the shape of `x`."""
        raise NotImplementedError

    @classmethod
    def branch_gain(cls, place: Place | None) -> float:
        """Factor of the branch's initial weights, except those of queries and keys."""
        return 1.0

    @classmethod
    def enter(cls, x: Array) -> Array:
        """The trunk that the first layer takes, made from x (..., features)."""
        return x if cls.streams == 1 else jnp.stack([x] * cls.streams, axis=-2)

    @classmethod
    def leave(cls, x: Array) -> Array:
        """The trunk that the last layer returns, as (..., features)."""
        return x if cls.streams == 1 else x.sum(axis=-2)


def check_rule(rule: object, valid: Collection[str]) -> None:
    """Raises a UserError unless `rule` is a name in `valid` or a subclass of `Rule`."""
    if isinstance(rule, str):
        check_choice("residual rule", rule, valid)
    elif not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise UserError(f"residual={rule!r} is no subclass of rezero_jax.residual.Rule; give one")


def make_rule(
    rule: str | type[Rule] | RuleConfig,
    features: int,
    *,
    place: Place | None = None,
    rngs: nnx.Rngs,
) -> Rule:
    """The rule of this name, class or these options; the other arguments are those of `Rule`.

    Raises a UserError if no rule has this name, or the rule needs a place.
    """
    config = rule if isinstance(rule, RuleConfig) else RuleConfig(rule)
    return config.rule(config, features, place, rngs)
