"""Stacks of Transformer layers, scanned or unrolled."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Int

from rezero_jax.models.transformer.attention import Cache, Hidden
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

    def __call__(self, x: Hidden, *args: Any, **kwargs: Any) -> Hidden:
        return self.norm(self.layers(x, *args, **kwargs))


class Encoder(LayerStack):
    """A stack of `EncoderLayer`s."""

    layer = EncoderLayer

    def init_cache(self, batch_size: int, length: int) -> Any:
        """Room for `length` positions in every layer, laid out as the layers are.

        Returns:
          One `Cache` whose arrays have a leading layer axis if the stack is scanned; else a list of
          one for each layer.
        """
        blocks: Any = self.layers.blocks
        if isinstance(blocks, nnx.List):
            return [block.attention.init_cache(batch_size, length) for block in blocks]
        first = jax.eval_shape(lambda: self.layers.layers()[0])
        cache = first.attention.init_cache(batch_size, length)
        return jax.tree.map(lambda x: jnp.zeros((self.layers.depth, *x.shape), x.dtype), cache)

    def decode(
        self, x: Hidden, cache: Any, positions: Int[Array, "batch length"]
    ) -> tuple[Hidden, Any]:
        """All layers for inference, causal; see `EncoderLayer.decode` and `init_cache`."""
        blocks: Any = self.layers.blocks
        if isinstance(blocks, nnx.List):
            updated = []
            for block, own in zip(blocks, cache, strict=True):
                x, new = block.decode(x, own, positions)
                updated.append(new)
            return self.norm(x), updated
        graphdef, arrays = nnx.split(blocks)

        def layer(x: Hidden, own: Any) -> tuple[Hidden, Cache]:
            return nnx.merge(graphdef, own[0]).decode(x, own[1], positions)

        x, updated = jax.lax.scan(layer, x, (arrays, cache))
        return self.norm(x), updated


class Decoder(LayerStack):
    """A stack of `DecoderLayer`s, each of which sees the same memory."""

    layer = DecoderLayer
