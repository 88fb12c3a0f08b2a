"""Transformer layers to use in your own models (paper, section 3, and the authors' PyTorch code).

    encoder    x <- rule(x, self-attention), x <- rule(x, feed-forward)
    decoder    the same with attention to the encoder's output, the memory, between the two

The rule is one of `rezero_jax.residual`; ReZero's is x' = x + alpha F(x), and one alpha serves all
sublayers of a layer, as in paper and code.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from rezero_jax.errors import UserError
from rezero_jax.models import init
from rezero_jax.models.dropout import Dropout
from rezero_jax.models.transformer.attention import Attention, Cache, Hidden, Mask
from rezero_jax.models.transformer.options import ACTIVATIONS, LayerKeywords, LayerOptions
from rezero_jax.residual import GATES, Branch, Place, make_norm, make_rule, rule_class

KeyMask = Bool[Array, "batch keys"]
Trunk = Float[Array, "batch length *streams width"]


class FeedForward(nnx.Module):
    """F(x) = W2 dropout(activation(W1 x + b1)) + b2, on request with a norm before W2.

    Args:
      gain: what the initial weights are multiplied by.
      inner_norm: whether a norm follows the dropout.
    """

    def __init__(
        self,
        options: LayerOptions,
        *,
        gain: float = 1.0,
        inner_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.activation = options.activation
        width, hidden = options.width, options.feedforward or 4 * options.width
        # Along the mesh axis `model`, the hidden layer is cut.
        by_outputs, by_inputs = {"model_axis": -1}, {"model_axis": -2}
        self.up, self.down = (
            nnx.Linear(
                fan_in,
                fan_out,
                use_bias=options.bias,
                kernel_init=init.times(gain, init.xavier_uniform(fan_in, fan_out)),
                bias_init=init.torch_uniform(fan_in),
                kernel_metadata=kernel_metadata,
                bias_metadata=bias_metadata,
                dtype=options.dtype,
                rngs=rngs,
            )
            for fan_in, fan_out, kernel_metadata, bias_metadata in (
                (width, hidden, by_outputs, by_outputs),
                (hidden, width, by_inputs, {}),
            )
        )
        self.dropout = Dropout(options.dropout)
        self.norm = make_norm(options.norm, hidden, rngs=rngs) if inner_norm else nnx.identity

    def __call__(self, x: Hidden, *, rngs: nnx.Rngs | None = None) -> Hidden:
        hidden = ACTIVATIONS[self.activation](self.up(x))
        return self.down(self.norm(self.dropout(hidden, rngs=rngs)))


class TransformerLayer(nnx.Module):
    """The parts of a layer: self-attention, attention to a memory in decoders, a feed-forward.

    Batches come first: x is (batch, length, width), or (batch, length, streams, width) under a
    rule of several streams. Weights start Xavier uniform, as in the paper;
    attention's biases start at 0, the feed-forward's as those of PyTorch's Linear.

    Args:
      width, heads, feedforward, **keywords: see `LayerOptions`.
      place: the layer's number and the number of layers, for the rules that depend on the depth.
      rngs: source of the initial parameters.

    Raises:
      UserError: see `LayerOptions`; or an unknown residual rule, or one that needs `place`.
    """

    has_memory: bool

    def __init__(
        self,
        width: int,
        heads: int,
        feedforward: int | None = None,
        *,
        place: Place | None = None,
        rngs: nnx.Rngs,
        **keywords: Unpack[LayerKeywords],
    ):
        options = LayerOptions(width, heads, feedforward, **keywords)
        kind, sublayers = rule_class(options.residual), 3 if self.has_memory else 2
        if place is not None:
            place = replace(place, sublayers=sublayers)
        gain, inner_norm = kind.branch_gain(place), kind.has_inner_norm
        self.attention = Attention(options, gain=gain, inner_norm=inner_norm, rngs=rngs)
        if self.has_memory:
            # Sub-LN leaves attention to a memory as it is (torchscale).
            cross_gain = 1.0 if inner_norm else gain
            self.cross_attention = Attention(options, rotary=False, gain=cross_gain, rngs=rngs)
        self.feedforward = FeedForward(options, gain=gain, inner_norm=inner_norm, rngs=rngs)
        self.dropout = Dropout(options.dropout)
        one_gate = options.residual in GATES and options.alpha_per == "layer"
        rules: list[Any] = [
            make_rule(
                options.residual,
                width,
                place=place and replace(place, sublayer=sublayer),
                alpha_init=options.alpha_init,
                norm=options.norm,
                base_depth=options.base_depth,
                rngs=rngs,
            )
            for sublayer in range(1 if one_gate and not kind.has_norm else sublayers)
        ]
        if one_gate:
            for rule in rules[1:]:
                rule.alpha = rules[0].alpha
        self.rules = nnx.List(rules)

    def join(self, sublayer: int, x: Trunk, f: Branch, rngs: nnx.Rngs | None) -> Trunk:
        """x with the branch f, dropped out in training, joined to it by the sublayer's rule."""
        rule = self.rules[sublayer % len(self.rules)]
        return rule(x, lambda u: self.dropout(f(u), rngs=rngs))

    def check(self, x: Trunk, rngs: nnx.Rngs | None) -> None:
        """Raises the UserError of an invalid call."""
        if self.dropout.rate > 0 and not self.dropout.deterministic and rngs is None:
            raise UserError(
                "dropout in training needs rngs=nnx.Rngs(dropout=key); give it in the call, or "
                "call model.eval() first"
            )
        width, streams = self.feedforward.up.in_features, self.rules[0].streams
        last = (width,) if streams == 1 else (streams, width)
        if x.ndim != 2 + len(last) or x.shape[2:] != last:
            sizes = ", ".join(map(str, last))
            raise UserError(
                f"this layer takes sequences (batch, length, {sizes}), not {x.shape}; reshape x"
            )


class EncoderLayer(TransformerLayer):
    """Self-attention and feed-forward, as the official RZTXEncoderLayer; see `TransformerLayer`."""

    has_memory = False

    def __call__(
        self,
        x: Trunk,
        mask: Array | None = None,
        key_mask: KeyMask | None = None,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Trunk:
        """Returns x after the layer.

        Args:
          mask: bool (queries, keys), (batch, queries, keys) or (batch, heads, queries, keys), True
            where a query may attend to a key. PyTorch's masks say the opposite: give `~mask`.
          key_mask: bool (batch, keys), False at padding.
          is_causal: whether position i attends to positions 0 .. i only.
          rngs: source of the dropout, in training.

        Raises:
          UserError: x has another shape, a mask is not bool, or dropout lacks its `rngs`.
        """
        self.check(x, rngs)
        seen = combine(mask, key_mask)
        attention = partial(self.attention, mask=seen, is_causal=is_causal, rngs=rngs)
        x = self.join(0, x, attention, rngs)
        return self.join(1, x, partial(self.feedforward, rngs=rngs), rngs)

    def decode(
        self, x: Trunk, cache: Cache, layer: int | Array, positions: Int[Array, "batch length"]
    ) -> tuple[Trunk, Cache]:
        """The layer for inference, causal, the earlier positions in `cache`; see Attention."""

        def attention(u: Hidden) -> Hidden:
            nonlocal cache
            out, cache = self.attention.decode(u, cache, layer, positions)
            return out

        x = self.join(0, x, attention, None)
        return self.join(1, x, self.feedforward, None), cache


class DecoderLayer(TransformerLayer):
    """Self-attention, attention to a memory, feed-forward, as the official RZTXDecoderLayer."""

    has_memory = True

    def __call__(
        self,
        x: Trunk,
        memory: Float[Array, "batch places width"],
        mask: Array | None = None,
        memory_mask: Array | None = None,
        key_mask: KeyMask | None = None,
        memory_key_mask: Bool[Array, "batch places"] | None = None,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Trunk:
        """Returns x after the layer; the masks are as in `EncoderLayer`, for x and for `memory`."""
        self.check(x, rngs)
        if memory.ndim != 3 or memory.shape[::2] != (x.shape[0], x.shape[-1]):
            raise UserError(
                f"this layer takes a memory ({x.shape[0]}, length, {x.shape[-1]}), not "
                f"{memory.shape}; reshape memory"
            )
        seen, seen_memory = combine(mask, key_mask), combine(memory_mask, memory_key_mask)
        attention = partial(self.attention, mask=seen, is_causal=is_causal, rngs=rngs)
        x = self.join(0, x, attention, rngs)
        cross = partial(self.cross_attention, memory=memory, mask=seen_memory, rngs=rngs)
        x = self.join(1, x, cross, rngs)
        return self.join(2, x, partial(self.feedforward, rngs=rngs), rngs)


def combine(mask: Array | None, key_mask: KeyMask | None) -> Mask | None:
    """A layer's two masks as one, (batch, heads, queries, keys) with axes of size 1."""
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
