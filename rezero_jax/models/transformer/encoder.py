"""Stacks of Transformer layers, scanned or unrolled."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Int

from rezero_jax.models.transformer.attention import Cache, Sequence
from rezero_jax.models.transformer.layer import DecoderLayer, EncoderLayer
from rezero_jax.stack import Stack


class LayerStack(nnx.Module):
    """`depth` equal layers and perhaps a final LayerNorm, as pre-norm stacks have it.

    Made by `Encoder` and `Decoder`. Called like one layer.

    Args:
      width, heads: of the layers.
      depth: number of layers.
      final_norm: whether a LayerNorm follows the last one; ReZero needs none.
      scan, remat: see `rezero_jax.stack.Stack`.
      **options: of the layers.
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
        **options: Any,
    ):
        self.layers = Stack(
            lambda rngs: self.layer(width, heads, **options, rngs=rngs),
            depth,
            scan=scan,
            remat=remat,
            rngs=rngs,
        )
        dtype = options.get("dtype", jnp.float32)
        self.norm = (
            nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
            if final_norm
            else nnx.identity
        )

    def __call__(self, x: Sequence, *args: Any, **kwargs: Any) -> Sequence:
        return self.norm(self.layers(x, *args, **kwargs))


class Encoder(LayerStack):
    """A stack of `EncoderLayer`s."""

    layer = EncoderLayer

    def init_cache(self, batch_size: int, length: int) -> list[Cache]:
        """Room for `length` positions in every layer."""
        blocks = self.layers.layers()
        return [block.attention.init_cache(batch_size, length) for block in blocks]

    def decode(
        self, x: Sequence, caches: list[Cache], positions: Int[Array, "batch length"]
    ) -> tuple[Sequence, list[Cache]]:
        """All layers for inference, causal; see `EncoderLayer.decode`."""
        updated = []
        for block, cache in zip(self.layers.layers(), caches, strict=True):
            x, new = block.decode(x, cache, positions)
            updated.append(new)
        return self.norm(x), updated


class Decoder(LayerStack):
    """A stack of `DecoderLayer`s, each of which sees the same memory."""

    layer = DecoderLayer
