"""Multi-head attention: values weighted by the softmax of scaled products of queries and keys."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from rezero_jax import devices
from rezero_jax.errors import UserError
from rezero_jax.models import init
from rezero_jax.models.dropout import Dropout
from rezero_jax.models.transformer.config import TransformerConfig, check_heads

Hidden = Float[Array, "batch length width"]
Heads = Float[Array, "batch length heads size"]
KeyHeads = Float[Array, "batch keys kv_heads size"]
Mask = Bool[Array, "#batch #heads #queries keys"]
KeyMask = Bool[Array, "#batch keys"]
# Keys and values of the positions so far, of one layer or of all layers of a scan.
CachedHeads = Float[Array, "layers batch places kv_heads size"]
Cache = tuple[CachedHeads, CachedHeads]

BLOCK = 64  # least number of queries in a block of causal attention
BLOCKS = 8  # most blocks in a sequence on a CPU; each block is compiled
FEW_BLOCKS = 2  # most blocks on a TPU: more are not faster (docs/accelerators.md); GPUs use one

# NVIDIA's names of GPUs older than Ampere (compute capability 8.0).
BEFORE_AMPERE = re.compile(r"Tesla|Quadro|TITAN|GTX|MX\d|RTX 20\d\d|\bT\d")


class Attention(nnx.Module):
    """Attention with `heads` heads of size width / heads (arXiv 1706.03762, section 3.2).

    Weights start as in the authors' code: Xavier uniform, where the projections of queries, keys
    and values count as one matrix; biases at 0. All three projections are one parameter of shape
    (width, kv_heads, heads / kv_heads + 2, size): each key-value head has the kernels of its
    queries, then of its key, then of its value.

    Args:
      gain: factor of the initial weights of values and outputs.
      inner_norm: whether a norm precedes the output's projection.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        config: TransformerConfig,
        *,
        gain: float = 1.0,
        inner_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        check_heads(width, heads, config)
        kv_heads = config.kv_heads or heads
        self.size, self.dtype, self.rotary = width // heads, config.dtype, config.rotary
        shape = (kv_heads, heads // kv_heads + 2, self.size)
        xavier = init.xavier_uniform(width, width + 2 * kv_heads * self.size)
        kernel = xavier(rngs.params(), (width, *shape), jnp.float32)
        if gain != 1:
            kernel = kernel.at[:, :, -1].multiply(gain)
        # The key-value heads are sharded along the mesh axis `model`.
        self.qkv = nnx.Param(kernel, model_axis=-3, matrix_axes=((-4,), (-3, -1)))
        zeros = jnp.zeros(shape, jnp.float32)
        self.qkv_bias = nnx.Param(zeros, model_axis=-3) if config.bias else None
        self.out = nnx.Linear(
            width,
            width,
            use_bias=config.bias,
            kernel_init=init.times(gain, init.xavier_uniform(width, width)),
            kernel_metadata={"model_axis": -2},
            dtype=config.dtype,
            rngs=rngs,
        )
        self.plain = config.attention == "plain"
        self.norm = config.make_norm(width, rngs=rngs) if inner_norm else init.identity
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        memory: Float[Array, "batch keys width"] | None = None,
        *,
        mask: Array | None = None,
        key_mask: KeyMask | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch queries width"]:
        """Attends from x to `memory`, or to x itself.

        The masks are those of a layer, and `rngs` are for dropout, in training. A query that may
        attend to no key gets 0 from every head.
        """
        dropped = self.dropout.rate > 0 and not self.dropout.deterministic
        is_bare = memory is None and mask is None and key_mask is None
        if dropped and rngs is not None and is_bare:
            fused = self._flash(x, is_causal, rngs)
            if fused is not None:
                return self._join(fused)
        q, k, v = self._project(x, memory)
        (batch, length, heads, _), keys = q.shape, k.shape[1]
        mask = joint_mask(mask, key_mask, (batch, heads, length, keys))
        if self.rotary:
            q, k = (rotate(x, token_positions(x.shape[1], key_mask)) for x in (q, k))
        drop = (lambda weights: self.dropout(weights, rngs=rngs)) if dropped else None
        out = attend(q, k, v, mask=mask, is_causal=is_causal, drop=drop, plain=self.plain)
        if mask is not None:  # a softmax over no key would be the mean over all keys
            seen = mask & _causal(0, length, keys) if is_causal else mask
            out = jnp.where(seen.any(axis=-1).swapaxes(1, 2)[..., None], out, 0)
        return self._join(out)

    def init_cache(self, depth: int, batch_size: int, length: int) -> Cache:
        """An empty cache of `length` positions for `depth` layers."""
        shape = (depth, batch_size, length, self.qkv.shape[-3], self.size)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def decode(
        self, x: Hidden, cache: Cache, layer: int | Array, positions: Int[Array, "batch length"]
    ) -> tuple[Hidden, Cache]:
        """Causal self-attention of x at `positions`, with the earlier positions in the cache.

        Also returns the cache with the keys and values of x at `positions` of `layer`.
        """
        q, k, v = self._project(x)
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        rows = jnp.arange(x.shape[0])[:, None]
        keys, values = (
            old.at[layer, rows, positions].set(new) for old, new in zip(cache, (k, v), strict=True)
        )
        seen = jnp.arange(keys.shape[2])[None, None] <= positions[:, :, None]
        out = attend(q, keys[layer], values[layer], mask=seen[:, None])
        return self._join(out), (keys, values)

    def _project(
        self, x: Hidden, memory: Float[Array, "batch keys width"] | None = None
    ) -> tuple[Heads, KeyHeads, KeyHeads]:
        """Queries of x, and keys and values of the memory or of x itself."""

        if memory is None:
            y = self._slots(x)
            q, kv = y[:, :, :, :-2], y[:, :, :, -2:]
        else:
            q, kv = self._slots(x, slice(-2)), self._slots(memory, slice(-2, None))
        heads = self.out.in_features // self.size
        return q.reshape(*x.shape[:2], heads, self.size), kv[:, :, :, 0], kv[:, :, :, 1]

    def _slots(
        self, x: Hidden, slots: slice = slice(None), *, has_bias: bool = True
    ) -> Float[Array, "batch length kv_heads slots size"]:
        """The projections of x in these slots of each key-value head."""
        kernel = self.qkv[...][:, :, slots].astype(self.dtype)
        y = jnp.einsum("btw,wkjs->btkjs", x.astype(self.dtype), kernel)
        if has_bias and self.qkv_bias is not None:
            y = y + self.qkv_bias[...][None, None, :, slots].astype(self.dtype)
        return y

    def _flash(self, x: Hidden, is_causal: bool, rngs: nnx.Rngs) -> Heads | None:
        """Self-attention of x with dropout by a GPU's kernels; None if they do not take it."""
        kv_heads, slots, size = self.qkv.shape[-3:]
        if self.plain or slots > 3 or not _has_kernels(devices.target(), self.dtype):
            return None
        from rezero_jax.models.transformer import flash  # a slow import

        batch, length, _ = x.shape
        if not flash.takes(batch, length, kv_heads, size):
            return None
        key, bias = jax.random.key_data(rngs.dropout())[:2], self.qkv_bias
        if self.rotary:
            q, k, v = self._project(x)
            positions = token_positions(x.shape[1], None)
            qkv, bias = jnp.stack((rotate(q, positions), rotate(k, positions), v), axis=3), None
        else:
            qkv = self._slots(x, has_bias=False)
        added = (
            jnp.zeros(qkv.shape[2:], self.dtype) if bias is None else bias[...].astype(self.dtype)
        )
        return flash.flash(qkv, added, key, rate=self.dropout.rate, is_causal=is_causal)

    def _join(self, heads: Heads) -> Hidden:
        return self.out(self.norm(heads.reshape(*heads.shape[:2], self.out.in_features)))


def joint_mask(
    mask: Array | None, key_mask: KeyMask | None, shape: tuple[int, int, int, int]
) -> Mask | None:
    """Combines a layer's two masks; broadcasts to `shape`, (batch, heads, queries, keys).

    Raises a UserError for a mask of another dtype or shape.
    """
    batch, _, queries, keys = shape
    if mask is not None:
        check_mask("a mask", mask, (queries, keys), (batch, queries, keys), shape)
        mask = mask[:, None] if mask.ndim == 3 else mask[(None,) * (4 - mask.ndim)]
    if key_mask is None:
        return mask
    check_mask("a key mask", key_mask, (batch, keys))
    seen = key_mask[:, None, None]
    return seen if mask is None else mask & seen


def check_mask(what: str, mask: Any, *shapes: tuple[int, ...]) -> None:
    """Raises a UserError unless the mask is bool and broadcasts to one of the shapes."""
    dtype = str(getattr(mask, "dtype", type(mask).__name__))
    if dtype != "bool":
        raise UserError(f"{what} is bool, not {dtype}; give True where to attend")
    for shape in shapes:
        same = [size in (1, right) for size, right in zip(mask.shape, shape, strict=False)]
        if mask.ndim == len(shape) and mask.shape[-1] == shape[-1] and all(same):
            return
    raise UserError(
        f"{what} has the shape {' or '.join(map(str, shapes))} here, or 1 for all but the last "
        f"size, not {mask.shape}; reshape it"
    )


def token_positions(length: int, key_mask: KeyMask | None) -> Int[Array, "#batch length"]:
    """Positions 0, 1, .. of a sequence; a key mask's padding counts for none."""
    if key_mask is None:
        return jnp.arange(length)[None]
    return jnp.maximum(jnp.cumsum(key_mask, axis=1, dtype=jnp.int32) - 1, 0)


def attend(
    q: Float[Array, "batch queries heads size"],
    k: Float[Array, "batch keys kv_heads size"],
    v: Float[Array, "batch keys kv_heads size"],
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    drop: Callable[[Array], Array] | None = None,
    plain: bool = False,
) -> Float[Array, "batch queries heads size"]:
    """softmax(q k / sqrt(size)) v, with a float32 softmax.

    GPUs from Ampere on run cuDNN's flash attention, and TPUs splash attention for long sequences
    without a mask. Otherwise causal attention is computed in blocks of queries, each with the keys
    up to its end. Dropout has kernels on GPUs alone, see `flash`, which `Attention` calls.

    Args:
      drop: dropout, applied to the softmax. With it there are no kernels, and on a CPU no blocks.
      plain: whether every query meets every key, without kernels and blocks.
    """
    target = devices.target()
    length, keys = q.shape[1], k.shape[1]
    may_use_kernel = drop is None and not plain
    if may_use_kernel and mask is None and target.platform == "tpu":
        from rezero_jax.models.transformer import splash  # a slow import

        if splash.takes(q, k):
            return splash.splash(q, k, v, is_causal=is_causal)
    cudnn = may_use_kernel and _cudnn_takes(target, q, k)
    gpu, drops_on_cpu = target.platform == "gpu", drop is not None and target.platform == "cpu"
    may_use_blocks = not (plain or gpu or drops_on_cpu)
    if may_use_blocks and is_causal and mask is None and length == keys > 0:
        block = max(BLOCK, -(-length // (BLOCKS if target.platform == "cpu" else FEW_BLOCKS)))
        ends = [(start, min(start + block, length)) for start in range(0, length, block)]
        blocks = [
            _attend(q[:, start:stop], k[:, :stop], v[:, :stop], _causal(start, stop, stop), drop)
            for start, stop in ends
        ]
        return jnp.concatenate(blocks, axis=1)
    if cudnn or (drop is None and not gpu):
        if cudnn and mask is not None:  # cuDNN takes no axes of size 1
            mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[2], length, keys))
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=is_causal, implementation="cudnn" if cudnn else None
        )
    if is_causal:
        causal = _causal(0, length, keys)
        mask = causal if mask is None else mask & causal
    return _attend(q, k, v, mask, drop)


def _causal(start: int, stop: int, keys: int) -> Mask:
    """Mask of the queries start .. stop - 1, each of which sees the keys up to its own position."""
    return (jnp.arange(start, stop)[:, None] >= jnp.arange(keys)[None])[None, None]


def _attend(
    q: Array, k: Array, v: Array, mask: Mask | None, drop: Callable[[Array], Array] | None
) -> Array:
    """`attend` by plain products."""
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    grouped = (q * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgs,buks->bkgtu", grouped, k, preferred_element_type=jnp.float32)
    if mask is not None:
        if mask.shape[1] == 1:
            mask = mask[:, :, None]
        else:
            mask = mask.reshape(-1, kv_heads, heads // kv_heads, *mask.shape[2:])
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bkgtu,buks->btkgs", weights, v).reshape(q.shape)


def _has_kernels(target: devices.Target, dtype: Any) -> bool:
    """Whether the device has fused kernels for attention in this dtype."""
    nvidia = target.platform == "gpu" and target.kind.startswith("NVIDIA")  # not ROCm
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return nvidia and half and not BEFORE_AMPERE.search(target.kind)


def _cudnn_takes(target: devices.Target, q: Array, k: Array) -> bool:
    """Whether cuDNN's kernels take these arrays; JAX's own default never chooses them."""
    even = q.shape[1] % 2 == k.shape[1] % 2 == 0  # training refuses odd lengths
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return even and fits and _has_kernels(target, q.dtype)


def rotate(heads: Heads, positions: Int[Array, "#batch length"]) -> Heads:
    """Rotates each pair (i, i + size / 2) of a head by position * 10000^(-2 i / size)."""
    half = heads.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = heads[..., :half].astype(jnp.float32), heads[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(heads.dtype)
