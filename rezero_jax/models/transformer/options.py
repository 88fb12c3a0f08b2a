"""What the layers of one Transformer have in common: their sizes and how they are built."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rezero_jax.errors import UserError, choose_from

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # by erf, as in PyTorch
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
ALPHA_PER = ("layer", "sublayer")


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """Sizes and options of a Transformer layer, checked once and passed whole to its parts.

    Attributes:
      width: size of the last axis of x.
      heads: number of attention heads; divides width.
      feedforward: width of the feed-forward's hidden layer; by default 4 * width.
      dropout: fraction dropped of the attention weights, the hidden layer and each branch.
      activation: a name of ACTIVATIONS.
      residual: a name of `rezero_jax.residual.RULES`.
      alpha_init: initial gate, where the rule has one.
      alpha_per: "layer", one gate for all sublayers, or "sublayer", one for each.
      bias: whether the projections have biases.
      kv_heads: number of heads of keys and values, each shared by heads / kv_heads heads of
        queries (grouped-query attention, arXiv 2305.13245); by default `heads`.
      rotary: whether self-attention turns queries and keys by their position (arXiv 2104.09864).
      dtype: dtype of the computation; parameters and the softmax are float32.

    Raises:
      UserError: a size is below 1 or does not divide as it must, or a name is unknown.
    """

    width: int
    heads: int
    feedforward: int = None  # type: ignore[assignment]
    _: dataclasses.KW_ONLY
    dropout: float = 0.0
    activation: str = "relu"
    residual: str = "rezero"
    alpha_init: float = 0.0
    alpha_per: str = "layer"
    bias: bool = True
    kv_heads: int = None  # type: ignore[assignment]
    rotary: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        defaults = {"feedforward": 4 * self.width, "kv_heads": self.heads}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("width", "heads", "kv_heads", "feedforward"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}; a layer needs a {name} of at least 1"
                )
        for name, total in (("heads", "width"), ("kv_heads", "heads")):
            part, whole = getattr(self, name), getattr(self, total)
            if whole % part:
                *most, last = (str(d) for d in range(1, whole + 1) if whole % d == 0)
                choices = f"{', '.join(most)} or {last}" if most else last
                raise UserError(
                    f"{name}={part} does not divide {total}={whole}; choose {choices} heads"
                )
        if self.rotary and self.width // self.heads % 2:
            raise UserError(
                f"rotary positions turn pairs, but a head has the odd size "
                f"{self.width // self.heads}; choose other heads or positions"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} is not a fraction; give 0 or more, below 1")
        for name, valid in (("activation", ACTIVATIONS), ("alpha_per", ALPHA_PER)):
            if getattr(self, name) not in valid:
                raise choose_from(name, getattr(self, name), valid)
