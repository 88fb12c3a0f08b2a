"""Stacks of Transformer layers, scanned or unrolled."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Int

from rezero_jax.models.transformer.attention import Cache, Hidden
from rezero_jax.models.transformer.layer import DecoderLayer, EncoderLayer
from rezero_jax.models.transformer.options import LayerOptions, StackKeywords
from rezero_jax.residual import Place, make_norm, rule_class
from rezero_jax.stack import Stack

# Stacks of at most so many layers are unrolled on accelerators: they need not write what each layer
# keeps for the backward pass into stacks, and sum gradients over devices once. It takes longer to
# compile.
UNROLLED = 16


class LayerStack(nnx.Module):
    """`depth` equal layers, and on request a final LayerNorm, as pre-norm stacks have it.

    Made by `Encoder` and `Decoder`. Called like one layer.

    Args:
      depth: number of layers.
      final_norm: whether a LayerNorm follows the last one; ReZero needs none.
      scan, remat: see `rezero_jax.stack.Stack`.
      width, heads, **keywords: see `LayerOptions`.
    """

    layer: type[EncoderLayer] | type[DecoderLayer]

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        *,
        final_norm: bool = False,
        scan: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
        **keywords: Unpack[StackKeywords],
    ):
        options = LayerOptions(width, heads, **keywords)
        self.rule = rule_class(options.residual)
        self.layers = Stack(
            lambda rngs, layer: self.layer(**vars(options), place=Place(layer, depth), rngs=rngs),
            depth,
            numbered=True,
            scan=scan,
            remat=remat,
            unroll=depth if depth <= UNROLLED else 1,
            rngs=rngs,
        )
        self.norm = (
            make_norm(options.norm, width, dtype=options.dtype, rngs=rngs)
            if final_norm
            else nnx.identity
        )

    def __call__(self, x: Hidden, *args: Any, **kwargs: Any) -> Hidden:
        return self.norm(self.rule.leave(self.layers(self.rule.enter(x), *args, **kwargs)))


class Encoder(LayerStack):
    """A stack of `EncoderLayer`s."""

    layer = EncoderLayer

    def init_cache(self, batch_size: int, length: int) -> list[Cache]:
        """Empty caches of `length` positions: one for all scanned layers, else one for each."""
        blocks: Any = self.layers.blocks
        if isinstance(blocks, nnx.List):
            return [block.attention.init_cache(1, batch_size, length) for block in blocks]
        return [blocks.attention.init_cache(self.layers.depth, batch_size, length)]

    def decode(
        self, x: Hidden, caches: list[Cache], positions: Int[Array, "batch length"]
    ) -> tuple[Hidden, list[Cache]]:
        """All layers for inference, causal; see `EncoderLayer.decode`."""
        blocks: Any = self.layers.blocks
        x = self.rule.enter(x)
        if isinstance(blocks, nnx.List):
            updated = []
            for block, cache in zip(blocks, caches, strict=True):
                x, cache = block.decode(x, cache, 0, positions)
                updated.append(cache)
            return self.norm(self.rule.leave(x)), updated
        # The cache is carried and not scanned over: each layer writes into it in place.
        (x, cache), _ = jax.lax.scan(
            lambda carry, layer: (layer[0].decode(*carry, layer[1], positions), None),
            (x, caches[0]),
            (blocks, jnp.arange(self.layers.depth)),
        )
        return self.norm(self.rule.leave(x)), [cache]


class Decoder(LayerStack):
    """A stack of `DecoderLayer`s, each of which sees the same memory."""

    layer = DecoderLayer
