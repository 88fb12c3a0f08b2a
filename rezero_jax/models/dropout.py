"""Dropout whose random bits accelerators draw fast."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from rezero_jax.devices import batch_axes, batch_shards

LEVELS = 2**16  # the rate is rounded to a multiple of 1 / LEVELS


class Dropout(nnx.Dropout):
    """nnx.Dropout, except under keys of the hardware's generator ("rbg").

    Under such keys each device along the mesh's batch axes draws the bits of its own examples, so
    the result depends on the key and on the mesh. Under JAX's default keys it is nnx.Dropout's.
    """

    def __call__(  # type: ignore[override]  # fewer arguments: those that our layers pass
        self, x: Array, *, rngs: nnx.Rngs | None = None
    ) -> Array:
        dropped = round(self.rate * LEVELS)
        if self.deterministic or dropped == 0 or rngs is None:
            return super().__call__(x, rngs=rngs)
        key = rngs.dropout()
        if "rbg" not in str(jax.random.key_impl(key)):
            return super().__call__(x, rngs=nnx.Rngs(dropout=key))
        # A factor instead of a choice: a TPU would pack the choices into words and unpack them.
        kept = jnp.minimum(random_bits(key, x.shape) // dropped, 1).astype(x.dtype)
        return x * (kept * (LEVELS / (LEVELS - dropped)))


def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """uint16 of this shape, whose first axis is a batch sharded along the mesh's batch axes."""
    mesh = jax.sharding.get_abstract_mesh()
    axes, shards = batch_axes(mesh), batch_shards(mesh)
    if shards == 1 or shape[0] % shards:
        return jax.random.bits(key, shape, jnp.uint16)

    def own(key: Array) -> Array:
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        return jax.random.bits(key, (shape[0] // shards, *shape[1:]), jnp.uint16)

    return jax.shard_map(own, in_specs=PartitionSpec(), out_specs=PartitionSpec(axes))(key)
