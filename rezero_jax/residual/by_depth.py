"""The rules whose multipliers or initial weights depend on the depth of the network."""

import math

import jax.numpy as jnp
from jax import Array

from rezero_jax.residual.normed import Normed, PreNorm
from rezero_jax.residual.rule import About, Branch, Constant, Place, Site, apply, required


class LayerNormScaling(Normed):
    """x' = x + F(LN x / sqrt(l)) in layer l = 1 .. L."""

    about = About(
        "no scaled initial weights besides", "arXiv 2502.05795, eq. 5", "lmsdss/LayerNorm-Scaling"
    )

    def __init__(self, site: Site):
        super().__init__(site)
        layer = jnp.asarray(required(site.place).layer, jnp.float32)
        self.factor = Constant(1 / jnp.sqrt(layer))

    def __call__(self, x: Array, f: Branch) -> Array:
        factor = self.factor[...].reshape((1,) * x.ndim)
        return (x + apply(f, factor * self.norm(x), x)).astype(x.dtype)


class DeepNorm(Normed):
    """x' = LN(B^(1/4) x + F(x)), B branches in the network (2 L, or 3 L with a memory)."""

    about = About(
        "weights of values, outputs and feed-forward times (4 B)^(-1/4)",
        "arXiv 2203.00555, figure 2 and section 4.2, encoder or decoder alone",
        "torchscale, deepnorm=True",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.factor = required(site.place).branches ** 0.25

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(self.factor * x + apply(f, x, x)).astype(x.dtype)

    @staticmethod
    def branch_gain(place: Place | None) -> float:
        return (4 * required(place).branches) ** -0.25


class SubNorm(PreNorm):
    """x' = x + F(LN x), F with a second norm before its last matrix."""

    about = About(
        "weights of values, outputs and feed-forward times sqrt(ln B), B branches",
        "arXiv 2210.06423 (Magneto, Sub-LN), section 2 and figure 2, encoder or decoder alone",
        "torchscale, subln=True",
    )
    has_inner_norm = True

    @staticmethod
    def branch_gain(place: Place | None) -> float:
        return math.sqrt(math.log(required(place).branches))


class CompleteP(Normed):
    """x' = x + F(LN x) / m, m = L / L0 for a base depth L0."""

    about = About(
        "Adam's epsilon of the layers' parameters / m",
        "arXiv 2505.01618, eq. 1 and Table 1 with alpha = 1",
        "EleutherAI/nanoGPT-mup, branch completep",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.factor = site.base_depth / required(site.place).layers

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.factor * apply(f, self.norm(x), x)).astype(x.dtype)
