"""The sizes and options of a Transformer layer, checked in one place."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax import Array

from rezero_jax.errors import UserError, choose_from

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    # By erf, as in PyTorch; jax.nn.gelu's erfc takes longer.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
ALPHA_PER = ("layer", "sublayer")
ATTENTION = ("auto", "plain")


class LayerKeywords(TypedDict, total=False):
    """The keywords of `LayerOptions`, for the signatures that pass them on."""

    dropout: float
    activation: str
    residual: str
    alpha_init: float | None
    alpha_per: str
    norm: str
    base_depth: int
    bias: bool
    kv_heads: int | None
    rotary: bool
    attention: str
    dtype: Any


class StackKeywords(LayerKeywords, total=False):
    """The same where feedforward is a keyword too."""

    feedforward: int | None


class ModelKeywords(TypedDict, total=False):
    """What `Transformer` passes on and does not look at."""

    feedforward: int | None
    kv_heads: int | None
    alpha_init: float | None
    alpha_per: str
    norm: str
    base_depth: int
    attention: str


@dataclass(frozen=True)
class LayerOptions:
    """Sizes and options of a Transformer layer, passed whole to attention and feed-forward.

    Attributes:
      width: size of the last axis of x.
      heads: number of attention heads; divides width.
      feedforward: width of the feed-forward's hidden layer; by default 4 * width.
      dropout: fraction dropped of the attention weights, the hidden layer and each branch.
      activation: a name of ACTIVATIONS.
      residual: a name of `rezero_jax.residual.RULES`.
      alpha_init: initial gate, where the rule has one; by default the rule's own.
      alpha_per: "layer", one gate for all sublayers, or "sublayer", one for each, as `layerscale`
        always has.
      norm: "layer_norm", or "dyt" in place of every norm (arXiv 2503.10622).
      base_depth: the depth at which `completep` and `depth_mup` are pre-norm.
      bias: whether the projections have biases.
      kv_heads: number of heads of keys and values, each shared by heads / kv_heads heads of
        queries (grouped-query attention, arXiv 2305.13245); by default `heads`.
      rotary: whether self-attention turns queries and keys by position (arXiv 2104.09864).
      attention: "auto", the fastest form on the devices, or "plain": every query meets every key,
        and a language model's loss takes all logits at once, as model FLOPs are counted.
      dtype: dtype of the computation; parameters, norms and the softmax are float32, and the trunk
        keeps the dtype of x.

    Raises:
      UserError: a size is below 1 or does not divide as it must, or a name is unknown.
    """

    width: int
    heads: int
    feedforward: int | None = None
    _: KW_ONLY
    dropout: float = 0.0
    activation: str = "relu"
    residual: str = "rezero"
    alpha_init: float | None = None
    alpha_per: str = "layer"
    norm: str = "layer_norm"
    base_depth: int = 2
    bias: bool = True
    kv_heads: int | None = None
    rotary: bool = False
    attention: str = "auto"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("width", "heads", "kv_heads", "feedforward", "base_depth"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"{name} is {size}; a layer needs a {name} of at least 1")
        for name, total in (("heads", "width"), ("kv_heads", "heads")):
            part, whole = getattr(self, name), getattr(self, total)
            if part is not None and whole % part:
                *most, last = (str(d) for d in range(1, whole + 1) if whole % d == 0)
                choices = f"{', '.join(most)} or {last}" if most else last
                raise UserError(
                    f"{name}={part} does not divide {total}={whole}; choose {choices} heads"
                )
        if self.rotary and self.width // self.heads % 2:
            raise UserError(
                "rotary positions turn pairs, but a head has the odd size "
                f"{self.width // self.heads}; choose other heads or positions"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} is not a fraction; give 0 or more, below 1")
        for name, valid in (
            ("activation", ACTIVATIONS),
            ("alpha_per", ALPHA_PER),
            ("attention", ATTENTION),
        ):
            if getattr(self, name) not in valid:
                raise choose_from(name, getattr(self, name), valid)
