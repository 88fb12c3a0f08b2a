"""Rules whose trunk has several streams: (..., streams, features)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.residual.rule import (
    Branch,
    Mark,
    Place,
    Reference,
    RuleConfig,
    align,
    apply,
    required,
    scale,
)
from rezero_jax.residual.rules import PreNorm

SINKHORN_STEPS = 20  # of the paper and of maxtext


class StreamWeight(nnx.Param, metaclass=Mark):
    """A weight that mixes streams, in the gates' optimizer group; `rate` multiplies their rate."""


class X0Scalars(PreNorm):
    """x' = u + F(LN u), u = lambda x + mu x0 in a layer's first branch, else u = x.

    The streams are x and x0, the trunk before layer 1, which no layer changes.
    """

    reference = Reference(
        "by layer, lambda from 1.15 to 1.05, mu from 0.20 to 0.05; lambda's rate / 100",
        "no paper",
        "karpathy/nanochat, gpt.py",
    )
    streams = 2

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        place = required(place)
        depth = (jnp.asarray(place.layer, jnp.float32) - 1) / max(place.layers - 1, 1)
        first = place.sublayer == 0
        self.trunk_scale = StreamWeight(1.15 - 0.10 * depth, rate=0.01) if first else None
        self.x0_scale = StreamWeight(0.20 - 0.15 * depth) if first else None

    def __call__(self, x: Array, f: Branch) -> Array:
        u, x0 = x[..., 0, :], x[..., 1, :]
        if self.trunk_scale is not None and self.x0_scale is not None:
            u = (scale(self.trunk_scale[...], u) + scale(self.x0_scale[...], x0)).astype(x.dtype)
        return jnp.stack([super().__call__(u, f), x0], axis=-2)

    @classmethod
    def leave(cls, x: Array) -> Array:
        return x[..., 0, :]


class HyperConnections(PreNorm):
    """X' = A_r^T X + beta F(LN A_m^T X), X of 4 streams; (A_m A_r) and beta depend on X.

    (A_m A_r) = S + s tanh(LN(X) W) and beta = b + t tanh(LN(X) w), where S, s, W, b, t and w are
    learned. At first s = t = 0.01, and S selects one stream for A_m (the branch's number modulo 4)
    and is the identity for A_r. All streams start as x, and the network ends with their sum.
    """

    reference = Reference(
        "W, w 0 and b 1: four times pre_norm",
        "arXiv 2409.19606, algorithm 2, dynamic",
        "x-transformers",
    )
    streams = 4

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        place, n = required(place), self.streams
        number = (place.layer - 1) * place.sublayers + place.sublayer
        own = jax.nn.one_hot(jnp.asarray(number) % n, n, dtype=jnp.float32)[:, None]
        self.mix = StreamWeight(jnp.concatenate([own, jnp.eye(n, dtype=jnp.float32)], axis=1))
        self.spread = StreamWeight(jnp.ones((n,), jnp.float32))
        self.mix_scale = StreamWeight(jnp.full((), 0.01, jnp.float32))
        self.spread_scale = StreamWeight(jnp.full((), 0.01, jnp.float32))
        self.mix_weights = nnx.Param(jnp.zeros((features, n + 1), jnp.float32))
        self.spread_weights = nnx.Param(jnp.zeros((features, 1), jnp.float32))
        self.stream_norm = config.make_norm(features, rngs=rngs)

    def __call__(self, x: Array, f: Branch) -> Array:
        normed = self.stream_norm(x)
        mix = scale(self.mix_scale[...], jnp.tanh(normed @ self.mix_weights[...]))
        spread = scale(self.spread_scale[...], jnp.tanh(normed @ self.spread_weights[...]))
        mix = align(self.mix[...], x.ndim) + mix
        spread = align(self.spread[...], x.ndim - 1) + spread[..., 0]
        mixed = jnp.einsum("...nk,...nd->...kd", mix, x)
        u = mixed[..., 0, :]
        fx = apply(f, self.norm(u), x)
        return (mixed[..., 1:, :] + spread[..., None] * fx[..., None, :]).astype(x.dtype)


def sinkhorn(logits: Array) -> Array:
    """exp(logits) (..., n, n) after SINKHORN_STEPS normalisations of the columns, then of the rows.

    The rows sum to 1, and the columns nearly (Sinkhorn and Knopp; arXiv 2512.24880, eq. 9).
    """

    def step(_: Any, m: Array) -> Array:
        m = m / m.sum(0, keepdims=True)
        return m / m.sum(1, keepdims=True)

    # With the matrices' axes first, a CPU adds whole vectors, which is three times faster.
    first = jnp.moveaxis(logits, (-2, -1), (0, 1))
    # A softmax over the columns avoids overflow; 1e-6 keeps every row above 0, as in maxtext.
    positive = jax.nn.softmax(first, axis=0) + 1e-6
    return jnp.moveaxis(jax.lax.fori_loop(0, SINKHORN_STEPS, step, positive), (0, 1), (-2, -1))


class ManifoldHyperConnections(PreNorm):
    """X' = H_res X + H_post^T F(LN H_pre X), X of 4 streams; H_res is doubly stochastic.

    All three depend on X: with (P, O, R) = a * (RMSNorm(vec X) W) + b and one a for each of them,
    H_pre = sigmoid(P), H_post = 2 sigmoid(O), and H_res is exp(R) after 20 steps of Sinkhorn and
    Knopp. The norm's scale is part of W. The paper states only the initial value of a; the other
    initial values are maxtext's. (Under W = 0, equal streams would remain equal.)
    """

    reference = Reference(
        "a 0.01, b 0, W Normal(0, 1 / size of vec X): about four times pre_norm",
        "arXiv 2512.24880, eq. 7 to 9",
        "maxtext, layers/mhc.py",
    )
    streams = 4

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        n = self.streams
        size, maps = n * features, n * (2 + n)
        normal = nnx.initializers.normal(size**-0.5)
        self.mix_scale = StreamWeight(jnp.full((3,), 0.01, jnp.float32))
        self.mix_bias = StreamWeight(jnp.zeros((maps,), jnp.float32))
        self.mix_weights = nnx.Param(normal(rngs.params(), (size, maps), jnp.float32))

    def __call__(self, x: Array, f: Branch) -> Array:
        pre, post, res = self.maps(x)
        u = jnp.einsum("...n,...nd->...d", pre, x).astype(x.dtype)
        fx = apply(f, self.norm(u), x)
        mixed = jnp.einsum("...kn,...nd->...kd", res, x)
        return (mixed + post[..., None] * fx[..., None, :]).astype(x.dtype)

    def maps(self, x: Array) -> tuple[Array, Array, Array]:
        """H_pre (..., n), H_post (..., n) and H_res (..., n, n) for a trunk, all float32."""
        n, leading = self.streams, x.shape[:-2]
        flat = x.reshape(*leading, n * x.shape[-1]).astype(jnp.float32)
        flat = flat * jax.lax.rsqrt(jnp.mean(flat * flat, axis=-1, keepdims=True) + 1e-5)
        sizes = jnp.asarray([n, n, n * n])
        factors = jnp.repeat(self.mix_scale[...], sizes, total_repeat_length=n * (2 + n))
        bias = align(self.mix_bias[...], flat.ndim)
        logits = scale(factors, flat @ self.mix_weights[...]) + bias
        pre, post, res = jnp.split(logits, (n, 2 * n), axis=-1)
        res = sinkhorn(res.reshape(*leading, n, n))
        return jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), res
