"""The options of a Transformer's layers, checked in one place."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rezero_jax.errors import UserError, check_choice, check_sizes
from rezero_jax.residual import RuleConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    # By erf, as in PyTorch; jax.nn.gelu's erfc takes longer.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
NAMES = {
    "alpha_per": ("layer", "sublayer"),
    "attention": ("auto", "plain"),
    "activation": tuple(ACTIVATIONS),
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(RuleConfig):
    """Options of a Transformer's layers and of their residual rule.

    Attributes:
      alpha_per: "layer", one gate for all sublayers, or "sublayer", one for each, which
        `layerscale` always has.
      feedforward: width of the feed-forward's hidden layer; None is 4 * width.
      kv_heads: number of heads of keys and values, each shared by heads / kv_heads heads of
        queries (grouped-query attention, arXiv 2305.13245); None is the number of heads.
      rotary: whether self-attention rotates queries and keys by position (arXiv 2104.09864).
      attention: "auto", the fastest form on the devices, or "plain": every query meets every key,
        and a language model's loss takes all logits at once, as model FLOPs are counted.
      activation: a name of `rezero_jax.models.transformer.config.ACTIVATIONS`.
      dropout: fraction dropped of the attention weights, the hidden layer and each branch.
      stochastic_depth: probability that an example skips a branch of the last layer; it grows
        linearly from 0 in the first layer (arXiv 1603.09382).
      bias: whether the projections have biases.
      dtype: dtype of the computation; parameters, norms and the softmax are float32, and the trunk
        keeps the dtype of x.

    Raises:
      UserError: an option is out of range or unknown.

    Examples:
      >>> config = TransformerConfig(residual="pre_norm", kv_heads=2, dropout=0.1)
      >>> encoder = Encoder(64, depth=12, heads=4, config=config, rngs=nnx.Rngs(0))
    """

    alpha_per: str = "layer"
    feedforward: int | None = None
    kv_heads: int | None = None
    rotary: bool = False
    attention: str = "auto"
    activation: str = "relu"
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    bias: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(feedforward=self.feedforward, kv_heads=self.kv_heads)
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= (rate := getattr(self, name)) < 1:
                raise UserError(f"{name}={rate} is not a fraction; give 0 or more, below 1")
        for name, valid in NAMES.items():
            check_choice(name, getattr(self, name), valid)


def check_heads(width: int, heads: int, config: TransformerConfig) -> None:
    """Raises a UserError if the heads do not divide the width, or the kv_heads the heads."""
    check_sizes(width=width, heads=heads)
    for name, part, total, whole in (
        ("heads", heads, "width", width),
        ("kv_heads", config.kv_heads or heads, "heads", heads),
    ):
        if whole % part:
            choices = ", ".join(str(d) for d in range(1, whole + 1) if whole % d == 0)
            raise UserError(f"{name}={part} does not divide {total}={whole}; choose from {choices}")
    if config.rotary and width // heads % 2:
        raise UserError(f"rotary heads have an even size, not {width // heads}; choose other heads")
