"""The rules whose trunk has several streams: (..., streams, features)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.residual.normed import PreNorm
from rezero_jax.residual.rezero import scale
from rezero_jax.residual.rule import About, Branch, Site, apply, required


class Mix(nnx.Param):
    """A number by which streams are mixed: no weight decay, and a rate relative to the gates'."""


class X0Scalars(PreNorm):
    """x' = u + F(LN u), u = lambda x + mu x0 in a layer's first branch, else u = x.

    The streams are x and x0, the trunk that enters layer 1, which no layer changes.
    """

    about = About(
        "by layer, lambda from 1.15 to 1.05, mu from 0.20 to 0.05; lambda's rate / 100",
        "no paper",
        "karpathy/nanochat, gpt.py",
    )
    streams = 2

    def __init__(self, site: Site):
        super().__init__(site)
        place = required(site.place)
        depth = (jnp.asarray(place.layer, jnp.float32) - 1) / max(place.layers - 1, 1)
        first = place.sublayer == 0
        self.trunk_scale = Mix(1.15 - 0.10 * depth, rate=0.01) if first else None
        self.x0_scale = Mix(0.20 - 0.15 * depth) if first else None

    def __call__(self, x: Array, f: Branch) -> Array:
        u, x0 = x[..., 0, :], x[..., 1, :]
        if self.trunk_scale is not None and self.x0_scale is not None:
            u = (scale(self.trunk_scale[...], u) + scale(self.x0_scale[...], x0)).astype(x.dtype)
        return jnp.stack([super().__call__(u, f), x0], axis=-2)

    @staticmethod
    def enter(x: Array) -> Array:
        return jnp.stack([x, x], axis=-2)

    @staticmethod
    def leave(x: Array) -> Array:
        return x[..., 0, :]


class HyperConnections(PreNorm):
    """X' = A_r^T X + beta F(LN A_m^T X), X of 4 streams; (A_m A_r) and beta depend on X.

    (A_m A_r) = S + 0.01 tanh(LN(X) W) with the stream of its number for A_m, the identity for A_r,
    and beta = b + 0.01 tanh(LN(X) w), where S, W, b, w and both factors 0.01 are learned. All
    streams start as x, and their sum is what leaves the last layer.
    """

    about = About(
        "W, w 0 and b 1: four times pre_norm",
        "arXiv 2409.19606, algorithm 2, dynamic",
        "x-transformers",
    )
    streams = 4

    def __init__(self, site: Site):
        super().__init__(site)
        place, n = required(site.place), self.streams
        number = (place.layer - 1) * place.sublayers + place.sublayer
        own = jax.nn.one_hot(jnp.asarray(number) % n, n)[:, None]
        self.mix = Mix(jnp.concatenate([own, jnp.eye(n)], axis=1))
        self.spread = Mix(jnp.ones((n,), jnp.float32))
        self.mix_scale, self.spread_scale = (Mix(jnp.full((), 0.01, jnp.float32)) for _ in "ab")
        self.mix_weights = nnx.Param(jnp.zeros((site.features, n + 1), jnp.float32))
        self.spread_weights = nnx.Param(jnp.zeros((site.features, 1), jnp.float32))
        self.stream_norm = site.new_norm()

    def __call__(self, x: Array, f: Branch) -> Array:
        normed = self.stream_norm(x)
        mix, spread = (
            scale(factor[...], jnp.tanh(normed @ weights[...]))
            for factor, weights in (
                (self.mix_scale, self.mix_weights),
                (self.spread_scale, self.spread_weights),
            )
        )
        mix = jnp.expand_dims(self.mix[...], tuple(range(x.ndim - 2))) + mix
        spread = jnp.expand_dims(self.spread[...], tuple(range(x.ndim - 2))) + spread[..., 0]
        mixed = jnp.einsum("...nk,...nd->...kd", mix, x)
        u = mixed[..., 0, :]
        fx = apply(f, self.norm(u), u)
        return (mixed[..., 1:, :] + spread[..., None] * fx[..., None, :]).astype(x.dtype)

    @staticmethod
    def enter(x: Array) -> Array:
        return jnp.stack([x] * HyperConnections.streams, axis=-2)

    @staticmethod
    def leave(x: Array) -> Array:
        return x.sum(axis=-2)
