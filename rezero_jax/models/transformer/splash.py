"""Attention whose scores never leave the chip: JAX's splash attention, Pallas kernels for TPUs."""

import math

import jax
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Float

from rezero_jax.devices import batch_axes

# Least number of keys at which the kernels should be faster than the plain form. By the compiler's
# estimate for v5e (bfloat16, heads of 64 and 128, forward and backward) the plain form takes 50 to
# 100 ps for each score. The kernels write no scores: their matrix products take 12 ps at the chip's
# peak (9 ps if causal), and laying out their arguments 15 ps. At a third of the peak they take half
# the time of the plain form, and the same time at 512 keys.
FROM_LENGTH = 1024
BLOCK = 512  # most queries, and most keys, that a kernel keeps on the chip at once
LANES = 128  # the numbers of queries and of keys are multiples of this


def takes(q: Array, k: Array) -> bool:
    """Whether the kernels take these queries and keys and should be faster than the plain form."""
    axes, batch = _mesh_axes()
    return (
        k.shape[1] >= FROM_LENGTH
        and q.shape[1] % LANES == k.shape[1] % LANES == 0
        and q.shape[0] % math.prod(axes[name] for name in batch) == 0
        and k.shape[2] % axes.get("model", 1) == 0
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

    Args:
      is_causal: whether position i attends to positions 0 .. i only.
      interpret: whether to interpret the kernels, which works on any platform (default: False).
    """

    def own(q: Array, k: Array, v: Array) -> Array:
        shape = q.shape[1], k.shape[1]
        mask = masks.CausalMask(shape) if is_causal else masks.FullMask(shape)
        queries, keys = (math.gcd(length, BLOCK) for length in shape)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[2]),
            block_sizes=kernels.BlockSizes(
                block_q=queries,
                block_kv=keys,
                block_q_dkv=queries,
                block_kv_dkv=keys,
                block_q_dq=queries,
                block_kv_dq=keys,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q, k, v = (heads.swapaxes(1, 2) for heads in (q * q.shape[-1] ** -0.5, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    axes, batch = _mesh_axes()
    if not axes:
        return own(q, k, v)
    # The compiler cannot partition a kernel, and would gather all of q, k and v for it.
    spec = PartitionSpec(batch, None, "model" if "model" in axes else None)
    return jax.shard_map(
        own, in_specs=(spec,) * 3, out_specs=spec, axis_names=set(axes), check_vma=False
    )(q, k, v)


def _mesh_axes() -> tuple[dict[str, int], tuple[str, ...]]:
    """Sizes of the mesh axes along which the compiler shards arrays here, and the batch's axes."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {name: mesh.shape[name] for name in mesh.auto_axes}
    return axes, tuple(name for name in batch_axes(mesh) if name in axes)
