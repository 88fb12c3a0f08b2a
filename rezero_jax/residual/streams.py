"""The rules whose trunk has several streams: (..., streams, features)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.residual.normed import PreNorm
from rezero_jax.residual.rezero import scale
from rezero_jax.residual.rule import About, Branch, Site, required


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
