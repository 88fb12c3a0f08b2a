"""Transformer layers, drop-in parts of one's own models (paper, section 3; its PyTorch code).

    encoder    x <- rule(x, self-attention), x <- rule(x, feed-forward)
    decoder    the same with attention to the encoder's output, the memory, between the two

The rule is one of `rezero_jax.residual`; ReZero's is x' = x + alpha F(x), and one alpha serves all
sublayers of a layer, as in paper and code.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Int

from rezero_jax.errors import UserError, choose_from
from rezero_jax.models import init
from rezero_jax.models.transformer.attention import Attention, Cache, Mask, Sequence
from rezero_jax.residual import GATES, Branch, make_rule

KeyMask = Bool[Array, "batch keys"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # by erf, as in PyTorch
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
ALPHA_PER = ("layer", "sublayer")


class FeedForward(nnx.Module):
    """F(x) = W2 dropout(activation(W1 x + b1)) + b2; the arguments are those of `EncoderLayer`."""

    def __init__(
        self,
        width: int,
        feedforward: int,
        *,
        dropout: float,
        activation: str,
        bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        if feedforward < 1:
            raise UserError(f"feedforward is {feedforward}; a layer needs a width of at least 1")
        if activation not in ACTIVATIONS:
            raise choose_from("activation", activation, ACTIVATIONS)
        self.activation = activation
        # Along the mesh axis `model`, the hidden layer is cut.
        by_outputs, by_inputs = {"model_axis": -1}, {"model_axis": -2}
        self.up, self.down = (
            nnx.Linear(
                fan_in,
                fan_out,
                use_bias=bias,
                kernel_init=init.xavier_uniform(fan_in, fan_out),
                bias_init=init.torch_uniform(fan_in),
                kernel_metadata=kernel_metadata,
                bias_metadata=bias_metadata,
                dtype=dtype,
                rngs=rngs,
            )
            for fan_in, fan_out, kernel_metadata, bias_metadata in (
                (width, feedforward, by_outputs, by_outputs),
                (feedforward, width, by_inputs, {}),
            )
        )
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Sequence, *, rngs: nnx.Rngs | None = None) -> Sequence:
        hidden = ACTIVATIONS[self.activation](self.up(x))
        return self.down(self.dropout(hidden, rngs=rngs))


class Layer(nnx.Module):
    """The parts of a layer: attention to itself, to a memory or not, and a feed-forward.

    Batches come first: x is (batch, length, width). Weights start Xavier uniform, as in the paper;
    biases of attention at 0, of the feed-forward as PyTorch's Linear.

    Args:
      width: size of the last axis of x.
      heads: number of attention heads; divides width.
      feedforward: width of the feed-forward's hidden layer; by default 4 * width.
      dropout: fraction dropped of the attention weights, the hidden layer and each branch.
      activation: a name of ACTIVATIONS.
      residual: a name of `rezero_jax.residual.RULES`.
      alpha_init: initial gate, where the rule has one.
      alpha_per: "layer", one gate for all sublayers, or "sublayer", one for each.
      bias: whether the projections have biases.
      kv_heads, rotary: see `rezero_jax.models.transformer.attention.Attention`.
      dtype: dtype of the computation; parameters are float32.

    Raises:
      UserError: a size that cannot be, or an unknown name.
    """

    has_memory: bool

    def __init__(
        self,
        width: int,
        heads: int,
        feedforward: int | None = None,
        *,
        dropout: float = 0.0,
        activation: str = "relu",
        residual: str = "rezero",
        alpha_init: float = 0.0,
        alpha_per: str = "layer",
        bias: bool = True,
        kv_heads: int | None = None,
        rotary: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 0 <= dropout < 1:
            raise UserError(f"dropout={dropout} is not a fraction; give 0 or more, below 1")
        if alpha_per not in ALPHA_PER:
            raise choose_from("alpha_per", alpha_per, ALPHA_PER)
        common = {"dropout": dropout, "bias": bias, "dtype": dtype, "rngs": rngs}
        self.attention = Attention(width, heads, kv_heads=kv_heads, rotary=rotary, **common)
        if self.has_memory:
            self.cross_attention = Attention(width, heads, kv_heads=kv_heads, **common)
        hidden = 4 * width if feedforward is None else feedforward
        self.feedforward = FeedForward(width, hidden, activation=activation, **common)
        self.dropout = nnx.Dropout(dropout)
        shared = residual in GATES and alpha_per == "layer"
        self.rules = nnx.List(
            make_rule(residual, width, alpha_init=alpha_init, dtype=dtype, rngs=rngs)
            for _ in range(1 if shared else 3 if self.has_memory else 2)
        )

    def join(self, sublayer: int, x: Sequence, f: Branch, rngs: nnx.Rngs | None) -> Sequence:
        """x with the branch f, dropped out in training, joined to it by the sublayer's rule."""
        rule = self.rules[sublayer % len(self.rules)]
        return rule(x, lambda u: self.dropout(f(u), rngs=rngs))

    def check(self, x: Sequence, rngs: nnx.Rngs | None) -> None:
        """Raises the error of a call that cannot be."""
        if self.dropout.rate > 0 and not self.dropout.deterministic and rngs is None:
            raise UserError(
                "dropout in training needs rngs=nnx.Rngs(dropout=key); give it in the call, or "
                "call model.eval() first"
            )
        width = self.feedforward.up.in_features
        if x.ndim != 3 or x.shape[-1] != width:
            raise UserError(
                f"this layer takes sequences (batch, length, {width}), not {x.shape}; reshape x"
            )


class EncoderLayer(Layer):
    """Self-attention and feed-forward, as the official RZTXEncoderLayer; made as `Layer` says."""

    has_memory = False

    def __call__(
        self,
        x: Sequence,
        mask: Array | None = None,
        key_mask: KeyMask | None = None,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Sequence:
        """Returns x after the layer.

        Args:
          mask: bool (queries, keys), (batch, queries, keys) or (batch, heads, queries, keys), True
            where a query may attend to a key. PyTorch's masks say the opposite: give `~mask`.
          key_mask: bool (batch, keys), False at padding.
          is_causal: whether position i attends to positions 0 .. i only.
          rngs: source of the dropout, in training.

        Raises:
          UserError: x is no such sequence, a mask is not bool, or dropout lacks its `rngs`.
        """
        self.check(x, rngs)
        seen = combine(mask, key_mask)
        x = self.join(
            0,
            x,
            lambda u: self.attention(u, mask=seen, is_causal=is_causal, rngs=rngs),
            rngs,
        )
        return self.join(1, x, lambda u: self.feedforward(u, rngs=rngs), rngs)

    def decode(
        self, x: Sequence, cache: Cache, positions: Int[Array, "batch length"]
    ) -> tuple[Sequence, Cache]:
        """The layer for inference, causal, with the earlier positions in `cache`; see Attention."""

        def attention(u: Sequence) -> Sequence:
            nonlocal cache
            out, cache = self.attention.decode(u, cache, positions)
            return out

        x = self.join(0, x, attention, None)
        return self.join(1, x, self.feedforward, None), cache


class DecoderLayer(Layer):
    """Self-attention, attention to a memory, feed-forward, as the official RZTXDecoderLayer."""

    has_memory = True

    def __call__(
        self,
        x: Sequence,
        memory: Sequence,
        mask: Array | None = None,
        memory_mask: Array | None = None,
        key_mask: KeyMask | None = None,
        memory_key_mask: KeyMask | None = None,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Sequence:
        """Returns x after the layer; the masks are as in `EncoderLayer`, for x and for `memory`."""
        self.check(x, rngs)
        if memory.ndim != 3 or memory.shape[::2] != x.shape[::2]:
            raise UserError(
                f"this layer takes a memory ({x.shape[0]}, length, {x.shape[2]}), not "
                f"{memory.shape}; reshape memory"
            )
        seen, seen_memory = combine(mask, key_mask), combine(memory_mask, memory_key_mask)
        x = self.join(
            0,
            x,
            lambda u: self.attention(u, mask=seen, is_causal=is_causal, rngs=rngs),
            rngs,
        )
        x = self.join(
            1, x, lambda u: self.cross_attention(u, memory, mask=seen_memory, rngs=rngs), rngs
        )
        return self.join(2, x, lambda u: self.feedforward(u, rngs=rngs), rngs)


def combine(mask: Array | None, key_mask: KeyMask | None) -> Mask | None:
    """One mask (batch, heads, queries, keys), with axes of size 1, of a layer's two."""
    for given in (mask, key_mask):
        if given is not None and given.dtype != bool:
            raise UserError(f"a mask is bool, not {given.dtype}; give True where to attend")
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    if key_mask is None:
        return mask
    keys = key_mask[:, None, None]
    return keys if mask is None else mask & keys
