"""JAX's splash attention: Pallas kernels for TPUs whose scores never leave the chip."""

import math
from typing import Any

import jax
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Float

from rezero_jax.devices import batch_axes, batch_shards

# Least number of keys at which the kernels should be faster than the plain form. By the compiler's
# estimates for v5e, kernels at a third of the chip's peak take as long as the plain form at 512
# keys, and half of its time for many keys.
FROM_LENGTH = 1024
BLOCK = 512  # most queries, and most keys, that a kernel keeps on the chip at once
LANES = 128  # the numbers of queries and of keys are multiples of this


def takes(q: Array, k: Array) -> bool:
    """Whether the kernels take these queries and keys and should be faster than the plain form."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        k.shape[1] >= FROM_LENGTH
        and q.shape[1] % LANES == k.shape[1] % LANES == 0
        and q.shape[0] % batch_shards(mesh) == 0
        and k.shape[2] % mesh.shape.get("model", 1) == 0
    )


def splash(
    q: Float[Array, "batch queries heads size"],
    k: Float[Array, "batch keys kv_heads size"],
    v: Float[Array, "batch keys kv_heads size"],
    *,
    is_causal: bool,
    interpret: bool = False,
) -> Float[Array, "batch queries heads size"]:
    """softmax(q k / sqrt(size)) v, on each device for its shard of the batch and of the heads.

    If `interpret`, the kernels are interpreted, which works on any platform.
    """

    def own(q: Array, k: Array, v: Array) -> Array:
        shape = q.shape[1], k.shape[1]
        mask = masks.CausalMask(shape) if is_causal else masks.FullMask(shape)
        queries, keys = (math.gcd(length, BLOCK) for length in shape)
        sizes: dict[str, Any] = {f"block_q{use}": queries for use in ("", "_dkv", "_dq")}
        sizes |= {f"block_kv{use}": keys for use in ("", "_dkv", "_dq")}
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[2]),
            block_sizes=kernels.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q, k, v = (heads.swapaxes(1, 2) for heads in (q * q.shape[-1] ** -0.5, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return own(q, k, v)
    # The compiler cannot partition a kernel, and would gather all of q, k and v for it.
    spec = PartitionSpec(batch_axes(mesh), None, "model" if "model" in mesh.shape else None)
    return jax.shard_map(own, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)
