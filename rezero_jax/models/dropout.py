"""Dropout whose random bits accelerators draw fast, and stochastic depth."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from rezero_jax.devices import batch_axes, batch_shards, target
from rezero_jax.residual import Constant, Place

LEVELS = 2**16  # the rate is rounded to a multiple of 1 / LEVELS


class Dropout(nnx.Dropout):
    """nnx.Dropout, except on a GPU and under keys of the hardware's generator ("rbg").

    Under such keys each device along the mesh's batch axes draws the bits of its own examples, so
    the result depends on the key and on the mesh. On a GPU, what is dropped is a hash of the key
    and of the position, which XLA fuses into the product; the backward pass hashes again.
    """

    def __call__(  # type: ignore[override]  # fewer arguments: those that our layers pass
        self, x: Array, *, rngs: nnx.Rngs | None = None
    ) -> Array:
        dropped = round(self.rate * LEVELS)
        if self.deterministic or dropped == 0 or rngs is None:
            return super().__call__(x, rngs=rngs)
        key = rngs.dropout()
        if "rbg" not in str(jax.random.key_impl(key)):
            if target().platform == "gpu":
                return jax.checkpoint(_drop_by_hash, static_argnums=2, prevent_cse=False)(
                    x, jax.random.key_data(key), self.rate
                )
            return super().__call__(x, rngs=nnx.Rngs(dropout=key))
        # A factor instead of a choice: a TPU would pack the choices into words and unpack them.
        kept = jnp.minimum(random_bits(key, x.shape) // dropped, 1).astype(x.dtype)
        return x * (kept * (LEVELS / (LEVELS - dropped)))


class StochasticDepth(nnx.Module):
    """Drops the whole branch of an example, in training (arXiv 1603.09382, section 3).

    The probability grows linearly from 0 in the first layer to `rate` in the last; without a place
    it is `rate`. A branch that stays is divided by the probability to stay.
    """

    def __init__(self, rate: float, place: Place | None):
        share = 1.0 if place is None else (place.layer - 1) / max(place.layers - 1, 1)
        self.rate = Constant(jnp.asarray(rate * share, jnp.float32))
        self.deterministic = False

    def __call__(self, branch: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        if self.deterministic or rngs is None:
            return branch
        stays = 1 - self.rate[...]
        shape = (branch.shape[0], *(1,) * (branch.ndim - 1))
        kept = jax.random.bernoulli(rngs.dropout(), stays, shape)
        return branch * (kept / stays).astype(branch.dtype)


def _drop_by_hash(x: Array, key: Array, rate: float) -> Array:
    """Dropout of x by `hashed_bits`, at a rate rounded to a multiple of 2**-32."""
    kept = hashed_bits(key, x.shape) >= round(rate * 2**32)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)


def hashed_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """uint32 of this shape, from the two words of a threefry key, uint32 (2,).

    A threefry block for each number would take a GPU longer than the arithmetic of a layer.
    """
    return mix(jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape), key[0], key[1])


def mix(bits: Array, *words: Array) -> Array:
    """Wellons's hash of uint32 (https://nullprogram.com/blog/2018/07/31), once with each word."""
    for word in words:
        bits = bits + word
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
        bits = bits ^ (bits >> 16)
    return bits


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
