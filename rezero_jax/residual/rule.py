"""What every residual rule has in common: how it is called, made and described."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from flax import nnx
from jax import Array

from rezero_jax.errors import UserError
from rezero_jax.residual.norms import make_norm

Branch = Callable[[Array], Array]


class About(NamedTuple):
    """Where a rule comes from; its equation is the first line of its docstring.

    Attributes:
      start: initial values of what it learns, and its rules by depth.
      paper: the source, with the equation.
      code: a reference implementation.
    """

    start: str
    paper: str
    code: str


@dataclass(frozen=True)
class Place:
    """Where a branch stands in a network.

    Attributes:
      layer: its layer, 1 .. layers; in a scanned stack a traced int32 ().
      layers: number of layers.
      sublayer: which of the layer's branches it is, 0 .. sublayers - 1.
      sublayers: number of branches in a layer.
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
    """The place, which a rule that depends on the depth cannot do without."""
    if place is None:
        raise UserError(
            "this residual rule depends on the depth of the network; give place=Place(layer, "
            "layers), of rezero_jax.residual"
        )
    return place


@dataclass(frozen=True)
class Site:
    """All that a rule may be made from; see `rezero_jax.residual.make_rule`."""

    features: int
    rngs: nnx.Rngs
    place: Place | None = None
    alpha_init: float | None = None
    norm: str = "layer_norm"
    base_depth: int = 2

    def new_norm(self) -> Callable[[Array], Array]:
        """A norm of the trunk's features."""
        return make_norm(self.norm, self.features, rngs=self.rngs)


class Constant(nnx.Variable):
    """A number of a layer that is not trained, such as one that depends on the layer's place."""


class Rule(nnx.Module):
    """How a branch joins the trunk: maps x of shape (..., features) to the same shape and dtype.

    A rule of several streams maps (..., streams, features) instead, of which a branch sees one.

    Attributes:
      about: where it comes from.
      has_norm: whether it has parameters of its own beside a gate, for each branch anew.
      norms_branch: whether the branch sees a normalised trunk, and nothing normalises their sum: a
        network then ends with a norm.
      has_inner_norm: whether the sublayers have a second norm before their last matrix.
      streams: how many vectors of `features` the trunk has at each place.
      epsilon_scale: what Adam's epsilon is multiplied by for the parameters of a stack of layers.
      rate_scale: the same of their learning rate, but under SGD.
    """

    about: ClassVar[About]
    has_norm: ClassVar[bool] = False
    norms_branch: ClassVar[bool] = False
    has_inner_norm: ClassVar[bool] = False
    streams: ClassVar[int] = 1
    epsilon_scale: float = 1.0
    rate_scale: float = 1.0

    def __init__(self, site: Site | None = None):
        pass

    def __call__(self, x: Array, f: Branch) -> Array:
        """Returns x' for the trunk `x` and the branch `f`, which must keep the shape of `x`."""
        raise NotImplementedError

    @staticmethod
    def branch_gain(place: Place | None) -> float:
        """What the branch's initial weights are multiplied by, those of queries and keys apart."""
        return 1.0

    @staticmethod
    def enter(x: Array) -> Array:
        """The trunk (..., features) as the first layer takes it."""
        return x

    @staticmethod
    def leave(x: Array) -> Array:
        """What the last layer returns as (..., features)."""
        return x


def apply(f: Branch, x: Array, trunk: Array) -> Array:
    """f(x), which must have the shape of the trunk.

    Raises:
      ValueError: it has another shape.
    """
    fx = f(x)
    if fx.shape != trunk.shape:
        raise ValueError(
            f"a residual branch must keep the shape of the trunk, but it maps {trunk.shape} to "
            f"{fx.shape}"
        )
    return fx
