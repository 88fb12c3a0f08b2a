"""Transformer layers and stacks to use in your own models (paper, section 3; the authors' code).

An encoder layer is x <- rule(x, self-attention), x <- rule(x, feed-forward). A decoder layer has
attention to the encoder's output, the memory, between the two. One alpha serves all sublayers.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from rezero_jax.errors import UserError
from rezero_jax.models import init
from rezero_jax.models.dropout import Dropout, StochasticDepth
from rezero_jax.models.options import Module, takes_options
from rezero_jax.models.transformer.attention import Attention, Cache, Hidden, KeyMask
from rezero_jax.models.transformer.config import ACTIVATIONS, TransformerConfig
from rezero_jax.residual import Branch, Place, make_rule
from rezero_jax.stack import Stack

Trunk = Float[Array, "batch length *streams width"]

# Accelerators unroll stacks of at most this many layers, which copies no residuals and sums
# gradients over devices once, but takes longer to compile.
UNROLLED = 16
GPU_UNROLLED = 128  # the same on a GPU: one core compiles them in 75 s, with dropout in 320 s


class FeedForward(nnx.Module):
    """F(x) = W2 dropout(activation(W1 x + b1)) + b2.

    Args:
      gain: factor of the initial weights.
      inner_norm: whether a norm precedes W2.
    """

    def __init__(
        self,
        width: int,
        config: TransformerConfig,
        *,
        gain: float = 1.0,
        inner_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.activation = config.activation
        hidden = config.feedforward or 4 * width
        linear = partial(
            init.linear,
            kernel_init=init.times(gain, init.xavier_uniform(width, hidden)),
            use_bias=config.bias,
            dtype=config.dtype,
            rngs=rngs,
        )
        # The hidden layer is sharded along the mesh axis `model`.
        sharded = {"model_axis": -1}
        self.up = linear(width, hidden, kernel_metadata=sharded, bias_metadata=sharded)
        self.down = linear(hidden, width, kernel_metadata={"model_axis": -2})
        self.dropout = Dropout(config.dropout)
        self.norm = config.make_norm(hidden, rngs=rngs) if inner_norm else init.identity

    def __call__(self, x: Hidden, *, rngs: nnx.Rngs | None = None) -> Hidden:
        hidden = ACTIVATIONS[self.activation](self.up(x))
        return self.down(self.norm(self.dropout(hidden, rngs=rngs)))


class TransformerLayer(Module):
    """Self-attention, attention to a memory (in decoders), and a feed-forward, as one layer.

    Weights start Xavier uniform, as in the paper; attention's biases start at 0, and the
    feed-forward's biases as those of PyTorch's Linear. Under a rule of several streams, the layer
    takes (batch, length, streams, width) instead of (batch, length, width).
    """

    has_memory: bool

    @takes_options("feedforward")
    def __init__(
        self,
        width: int,
        heads: int,
        *args: Any,
        place: Place | None = None,
        config: TransformerConfig = TransformerConfig(),
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Makes one layer.

        Args:
          width: size of the last axis of x.
          heads: number of attention heads; divides width.
          place: the layer's number and the number of layers, for rules that depend on the depth.

        Raises:
          UserError: an option is invalid, the heads do not divide the width, the kv_heads do not
            divide the heads, or the rule needs `place`.
        """
        kind, sublayers = config.rule, 3 if self.has_memory else 2
        if place is not None:
            place = replace(place, sublayers=sublayers)
        gain, inner_norm = kind.branch_gain(place), kind.has_inner_norm
        attention = partial(Attention, width, heads, rngs=rngs)
        self.attention = attention(config, gain=gain, inner_norm=inner_norm)
        if self.has_memory:
            # sub_norm leaves attention to a memory as it is (torchscale).
            cross_gain = 1.0 if inner_norm else gain
            self.cross_attention = attention(replace(config, rotary=False), gain=cross_gain)
        self.feedforward = FeedForward(width, config, gain=gain, inner_norm=inner_norm, rngs=rngs)
        self.dropout = Dropout(config.dropout)
        rate = config.stochastic_depth
        self.stochastic_depth = StochasticDepth(rate, place) if rate else None
        one_gate = kind.shares_gate and config.alpha_per == "layer"
        rules: list[Any] = [
            make_rule(config, width, place=place and replace(place, sublayer=i), rngs=rngs)
            for i in range(1 if one_gate and not kind.has_norm else sublayers)
        ]
        if one_gate:
            for rule in rules[1:]:
                rule.alpha = rules[0].alpha
        self.rules = nnx.List(rules)

    def join(self, sublayer: int, x: Trunk, f: Branch, rngs: nnx.Rngs | None) -> Trunk:
        """Joins the branch f, with dropout, to the trunk x by the sublayer's rule."""

        def branch(u: Array) -> Array:
            fu = self.dropout(f(u), rngs=rngs)
            return fu if self.stochastic_depth is None else self.stochastic_depth(fu, rngs=rngs)

        return self.rules[sublayer % len(self.rules)](x, branch)

    def _check(self, x: Trunk, rngs: nnx.Rngs | None) -> None:
        """Raises a UserError for x of another shape, and for dropout without `rngs`."""
        drops = self.dropout.rate > 0 or self.stochastic_depth is not None
        if drops and not self.dropout.deterministic and rngs is None:
            raise UserError("dropout needs rngs=nnx.Rngs(dropout=key); give it, or call eval()")
        width, streams = self.feedforward.up.in_features, self.rules[0].streams
        last = (width,) if streams == 1 else (streams, width)
        if x.ndim != 2 + len(last) or x.shape[2:] != last:
            sizes = ", ".join(map(str, last))
            raise UserError(f"this layer takes (batch, length, {sizes}), not {x.shape}; reshape x")


class EncoderLayer(TransformerLayer):
    """Self-attention and feed-forward, as the official RZTXEncoderLayer; see `TransformerLayer`.

    Examples:
      >>> layer = EncoderLayer(64, heads=4, activation="gelu", rngs=nnx.Rngs(0))
      >>> assert layer(jnp.ones((2, 7, 64)), is_causal=True).shape == (2, 7, 64)
    """

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
            where a query may attend to a key. PyTorch's masks mean the opposite: give `~mask`.
          key_mask: bool (batch, keys), False at padding, on whichever side.
          is_causal: whether position i attends to positions 0 .. i only.
          rngs: source of the dropout, in training.

        Raises:
          UserError: x or a mask has another shape, a mask is not bool, or dropout lacks its `rngs`.
        """
        self._check(x, rngs)
        masks: dict[str, Any] = {"mask": mask, "key_mask": key_mask, "is_causal": is_causal}
        x = self.join(0, x, partial(self.attention, **masks, rngs=rngs), rngs)
        return self.join(1, x, partial(self.feedforward, rngs=rngs), rngs)

    def decode(
        self, x: Trunk, cache: Cache, layer: int | Array, positions: Int[Array, "batch length"]
    ) -> tuple[Trunk, Cache]:
        """The layer for causal inference; see `Attention.decode`."""

        def attention(u: Hidden) -> Hidden:
            nonlocal cache
            out, cache = self.attention.decode(u, cache, layer, positions)
            return out

        x = self.join(0, x, attention, None)
        return self.join(1, x, self.feedforward, None), cache


class DecoderLayer(TransformerLayer):
    """Self-attention, attention to a memory, feed-forward, as the official RZTXDecoderLayer.

    Examples:
      >>> layer = DecoderLayer(64, heads=4, rngs=nnx.Rngs(0))
      >>> assert layer(jnp.ones((2, 7, 64)), memory=jnp.ones((2, 5, 64))).shape == (2, 7, 64)
    """

    has_memory = True

    def __call__(
        self,
        x: Trunk,
        memory: Float[Array, "batch places width"],
        mask: Array | None = None,
        memory_mask: Array | None = None,
        key_mask: KeyMask | None = None,
        memory_key_mask: Bool[Array, "#batch places"] | None = None,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Trunk:
        """Returns x after the layer; the masks are as in `EncoderLayer`, for x and for `memory`."""
        self._check(x, rngs)
        if memory.ndim != 3 or memory.shape[::2] != (x.shape[0], x.shape[-1]):
            wanted = f"({x.shape[0]}, length, {x.shape[-1]})"
            raise UserError(f"this layer takes a memory {wanted}, not {memory.shape}; reshape it")
        masks: dict[str, Any] = {"mask": mask, "key_mask": key_mask, "is_causal": is_causal}
        x = self.join(0, x, partial(self.attention, **masks, rngs=rngs), rngs)
        seen: dict[str, Any] = {"memory": memory, "mask": memory_mask, "key_mask": memory_key_mask}
        x = self.join(1, x, partial(self.cross_attention, **seen, rngs=rngs), rngs)
        return self.join(2, x, partial(self.feedforward, rngs=rngs), rngs)


class LayerStack(Module):
    """`depth` equal layers and an optional final norm; called like one layer."""

    layer: type[EncoderLayer] | type[DecoderLayer]

    @takes_options()
    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        final_norm: bool = False,
        scan: bool = True,
        remat: str = "none",
        config: TransformerConfig = TransformerConfig(),
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Makes the stack, with the errors of `TransformerLayer` and `rezero_jax.stack.Stack`.

        Args:
          width: size of the last axis of x.
          depth: number of layers.
          heads: number of attention heads; divides width.
          final_norm: whether a norm follows the last layer; ReZero needs none.
          scan: see `rezero_jax.stack.Stack`.
          remat: see `rezero_jax.stack.Stack`.
        """
        self.rule = config.rule
        self.layers = Stack(
            lambda rngs, layer: self.layer(
                width, heads, config=config, place=Place(layer, depth), rngs=rngs
            ),
            depth,
            numbered=True,
            scan=scan,
            remat=remat,
            unroll=depth if depth <= UNROLLED else 1,
            gpu_unroll=depth if depth <= GPU_UNROLLED and remat == "none" else 4,
            rngs=rngs,
        )
        self.norm = (
            config.make_norm(width, dtype=config.dtype, rngs=rngs) if final_norm else init.identity
        )

    def __call__(self, x: Hidden, *args: Any, **kwargs: Any) -> Hidden:
        return self.norm(self.rule.leave(self.layers(self.rule.enter(x), *args, **kwargs)))


class Encoder(LayerStack):
    """A stack of `EncoderLayer`s.

    Examples:
      >>> encoder = Encoder(64, depth=128, heads=4, residual="rezero", rngs=nnx.Rngs(0))
      >>> assert encoder(jnp.ones((2, 7, 64))).shape == (2, 7, 64)
    """

    layer = EncoderLayer

    def init_cache(self, batch_size: int, length: int) -> list[Cache]:
        """Empty caches of `length` positions: one for all layers if scanned, else one for each."""
        blocks: Any = self.layers.blocks
        if isinstance(blocks, nnx.List):
            return [block.attention.init_cache(1, batch_size, length) for block in blocks]
        return [blocks.attention.init_cache(self.layers.depth, batch_size, length)]

    def decode(
        self, x: Hidden, caches: list[Cache], positions: Int[Array, "batch length"]
    ) -> tuple[Hidden, list[Cache]]:
        """All layers for causal inference; see `EncoderLayer.decode`."""
        blocks: Any = self.layers.blocks
        x, caches = self.rule.enter(x), list(caches)
        if isinstance(blocks, nnx.List):
            for i, block in enumerate(blocks):
                x, caches[i] = block.decode(x, caches[i], 0, positions)
        else:
            # The cache is a carry of the scan, so that each layer updates it in place.
            (x, caches[0]), _ = jax.lax.scan(
                lambda carry, layer: (layer[0].decode(*carry, layer[1], positions), None),
                (x, caches[0]),
                (blocks, jnp.arange(self.layers.depth)),
            )
        return self.norm(self.rule.leave(x)), caches


class Decoder(LayerStack):
    """A stack of `DecoderLayer`s, each of which sees the same memory.

    Examples:
      >>> decoder = Decoder(64, depth=6, heads=4, rngs=nnx.Rngs(0))
      >>> y = decoder(jnp.ones((2, 7, 64)), memory=jnp.ones((2, 5, 64)), is_causal=True)
    """

    layer = DecoderLayer
