"""Flash attention with dropout (arXiv 2205.14135), as Pallas kernels for GPUs.

The scores never leave the chip. The fused attention of cuDNN cannot draw new dropout at every step.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec
from jaxtyping import Float, UInt32

from rezero_jax import devices
from rezero_jax.devices import batch_axes, batch_shards
from rezero_jax.models.dropout import mix

BLOCK = 64  # queries, or keys, in a block
SIZES = (16, 32, 64, 128, 256)  # sizes of a head
# GPUs whose multiprocessors have the 172 kB of shared memory that heads of size 256 need.
HAS_MEMORY = re.compile(r"NVIDIA G?[HB]\d00")
LOWEST = -1e30  # a score that is masked


def takes(batch: int, length: int, heads: int, size: int) -> bool:
    """Whether the kernels take queries, keys and values of these sizes on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    divides = batch % batch_shards(mesh) == heads % mesh.shape.get("model", 1) == 0
    fits = size < 256 or HAS_MEMORY.match(devices.target().kind) is not None
    return divides and fits and length % BLOCK == 0 and size in SIZES


def flash(
    qkv: Float[Array, "batch length heads 3 size"],
    bias: Float[Array, "heads 3 size"],
    key: UInt32[Array, "2"],
    *,
    rate: float,
    is_causal: bool,
    interpret: bool = False,
) -> Float[Array, "batch length heads size"]:
    """dropout(softmax(q k / sqrt(size))) v, where (q, k, v) = qkv + bias.

    Each device computes its shard of the batch and of the heads. What is dropped is what
    `rezero_jax.models.dropout` drops on a GPU of weights (batch, heads, queries, keys). If
    `interpret`, the kernels are interpreted, which works on any platform.
    """
    mesh = jax.sharding.get_abstract_mesh()
    heads, square = qkv.shape[2], qkv.shape[1] ** 2
    axes = () if mesh.empty else batch_axes(mesh)
    model = "model" if "model" in mesh.shape else None

    def own(qkv: Array, bias: Array, key: Array) -> Array:
        head = jax.lax.axis_index(axes) * qkv.shape[0] * heads if axes else 0
        head += jax.lax.axis_index(model) * qkv.shape[2] if model else 0
        seed = jnp.stack([*key, jnp.asarray(head, jnp.uint32) * square])
        return _flash(qkv, bias, seed, _Options(heads, rate, is_causal, interpret))

    if mesh.empty:
        return own(qkv, bias, key)
    spec = PartitionSpec(axes, None, model)
    specs = (spec, PartitionSpec(model), PartitionSpec())
    return jax.shard_map(own, in_specs=specs, out_specs=spec, check_vma=False)(qkv, bias, key)


class _Options(NamedTuple):
    heads: int  # on all devices
    rate: float
    is_causal: bool
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _flash(qkv: Array, bias: Array, seed: Array, options: _Options) -> Array:
    """`flash` on one device; the seed is the key and the place of the device's first weight."""
    return _forward(qkv, bias, seed, options)[0]


def _forward(qkv: Array, bias: Array, seed: Array, options: _Options) -> tuple[Array, Any]:
    batch, length, heads, _, size = qkv.shape
    shape = (batch, length, heads)
    shapes = ((*shape, size), qkv.dtype), (shape, jnp.float32)
    out, log = _call(_forward_kernel, options, shapes, qkv, bias, seed)
    return out, (qkv, bias, seed, out, log)


def _backward(options: _Options, saved: Any, g: Array) -> tuple[Array, Array, None]:
    qkv, bias, seed, out, log = saved
    # For each query, the sum over the keys of weights times their gradients.
    sums = jnp.einsum("bths,bths->bth", out, g, preferred_element_type=jnp.float32)
    shapes = ((qkv.shape, qkv.dtype),)
    (dqkv,) = _call(_backward_kernel, options, shapes, qkv, bias, seed, log, sums, g)
    return dqkv, dqkv.sum((0, 1)), None


_flash.defvjp(_forward, _backward)


def _call(kernel: Any, options: _Options, shapes: Any, *arrays: Array) -> Sequence[Array]:
    """Runs a kernel for each block of positions of each head of each example."""
    qkv, bias, seed, *others = arrays
    batch, length, heads, _, size = qkv.shape

    def spec(shape: tuple[int, ...], rows: int) -> pl.BlockSpec:
        """One block, or all positions, of an array (batch, length, heads, ...)."""
        tail = shape[3:]
        return pl.BlockSpec(
            (None, rows, None, *tail),
            lambda n, h, b: (b, n if rows == BLOCK else 0, h, *(0,) * len(tail)),
        )

    return pl.pallas_call(
        partial(kernel, options),
        grid=(length // BLOCK, heads, batch),
        in_specs=[
            spec(qkv.shape, length),
            pl.BlockSpec((None, *bias.shape[1:]), lambda n, h, b: (h, 0, 0)),
            pl.BlockSpec(seed.shape, lambda n, h, b: (0,)),
            *(spec(array.shape, length) for array in others),
        ],
        out_specs=[spec(shape, BLOCK) for shape, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        compiler_params=triton.CompilerParams(
            num_warps=4 if size <= 64 else 8,
            num_stages=2 if size <= 128 else 1,  # two would take 238 kB
        ),
        interpret=options.interpret,
        name=f"flash{kernel.__name__}",
    )(*arrays)


def _rows(ref: Any, block: Array, *slot: int) -> Array:
    return ref[(pl.ds(block * BLOCK, BLOCK), *slot)]


class _Tile:
    """What both kernels compute of a block i of queries and a block j of keys."""

    def __init__(self, options: _Options, qkv_ref: Any, bias_ref: Any, seed_ref: Any):
        self.options, self.qkv, self.bias = options, qkv_ref, bias_ref
        self.length, _, self.size = qkv_ref.shape
        head = pl.program_id(2) * options.heads + pl.program_id(1)
        self.words = seed_ref[0], seed_ref[1]
        self.first = seed_ref[2] + head.astype(jnp.uint32) * jnp.uint32(self.length**2)

    def read(self, block: Array, slot: int) -> Array:
        """Queries (slot 0), keys (1) or values (2) of a block."""
        return _rows(self.qkv, block, slot) + self.bias[slot][None]

    def places(self, i: Array, j: Array) -> tuple[Array, Array]:
        t, u = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
        return t + i * BLOCK, u + j * BLOCK

    def scores(self, q: Array, k: Array, i: Array, j: Array) -> Array:
        """Scores to the base 2."""
        scores = triton.dot(q, k, trans_b=True) * (self.size**-0.5 * math.log2(math.e))
        t, u = self.places(i, j)
        return jnp.where(t >= u, scores, LOWEST) if self.options.is_causal else scores

    def drop(self, weights: Array, i: Array, j: Array) -> Array:
        t, u = self.places(i, j)
        rate = self.options.rate
        bits = mix(self.first + (t * self.length + u).astype(jnp.uint32), *self.words)
        return jnp.where(bits >= round(rate * 2**32), weights * (1 / (1 - rate)), 0.0)


def _forward_kernel(
    options: _Options, qkv_ref: Any, bias_ref: Any, seed_ref: Any, out_ref: Any, log_ref: Any
) -> None:
    i, tile = pl.program_id(0), _Tile(options, qkv_ref, bias_ref, seed_ref)
    q = tile.read(i, 0)

    def add(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = sums
        scores = tile.scores(q, tile.read(j, 1), i, j)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        dropped = tile.drop(weights, i, j).astype(q.dtype)
        out = out * shrink[:, None] + triton.dot(dropped, tile.read(j, 2))
        return out, new_top, total * shrink + weights.sum(axis=1)

    blocks = i + 1 if options.is_causal else tile.length // BLOCK
    zeros = jnp.zeros((BLOCK, tile.size), jnp.float32)
    start = zeros, jnp.full((BLOCK,), LOWEST), jnp.zeros((BLOCK,), jnp.float32)
    out, top, total = jax.lax.fori_loop(0, blocks, add, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_ref[...] = top + jnp.log2(total)


def _backward_kernel(
    options: _Options, qkv_ref: Any, bias_ref: Any, seed_ref: Any, *refs: Any
) -> None:
    """Gradients of the block's keys and values from its later queries, and of its queries."""
    log_ref, sums_ref, g_ref, out_ref = refs
    n, tile = pl.program_id(0), _Tile(options, qkv_ref, bias_ref, seed_ref)
    q, k, v = (tile.read(n, slot) for slot in range(3))
    blocks, zeros = tile.length // BLOCK, jnp.zeros((BLOCK, tile.size), jnp.float32)

    def weights(q: Array, k: Array, v: Array, i: Array, j: Array) -> tuple[Array, Array, Array]:
        """The dropped weights, the gradient of the scores, and that of the output."""
        g = _rows(g_ref, i)
        soft = jnp.exp2(tile.scores(q, k, i, j) - _rows(log_ref, i)[:, None])
        gradient = tile.drop(triton.dot(g, v, trans_b=True), i, j) - _rows(sums_ref, i)[:, None]
        gradient = soft * gradient * tile.size**-0.5
        return tile.drop(soft, i, j).astype(q.dtype), gradient.astype(q.dtype), g

    def of_keys(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        q = tile.read(i, 0)
        dropped, gradient, g = weights(q, k, v, i, n)
        dk = sums[0] + triton.dot(gradient, q, trans_a=True)
        return dk, sums[1] + triton.dot(dropped, g, trans_a=True)

    def of_queries(j: Array, dq: Array) -> Array:
        other = tile.read(j, 1)
        return dq + triton.dot(weights(q, other, tile.read(j, 2), n, j)[1], other)

    first, stop = (n, n + 1) if options.is_causal else (0, blocks)
    dk, dv = jax.lax.fori_loop(first, blocks, of_keys, (zeros, zeros))
    dq = jax.lax.fori_loop(0, stop, of_queries, zeros)
    for slot, gradient in enumerate((dq, dk, dv)):
        out_ref[:, slot] = gradient.astype(out_ref.dtype)
