"""Rules whose multipliers or initial weights depend on the depth of the network."""

import math
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.residual.rule import (
    Branch,
    Constant,
    Place,
    Reference,
    RuleConfig,
    apply,
    required,
    scale,
)
from rezero_jax.residual.rules import Normed, PreNorm, ReZeroNorm


class LayerNormScaling(Normed):
    """x' = x + F(LN x / sqrt(l))."""

    reference = Reference(
        "no scaled initial weights", "arXiv 2502.05795", "lmsdss/LayerNorm-Scaling"
    )
    norms_branch = True

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        layer = jnp.asarray(required(place).layer, jnp.float32)
        self.factor = Constant(1 / jnp.sqrt(layer))

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + apply(f, scale(self.factor[...], self.norm(x)), x)).astype(x.dtype)


class DeepNorm(Normed):
    """x' = LN(B^(1/4) x + F(x)).

    B is the number of branches: 2 L in an encoder or a decoder alone, 3 L in a decoder with a
    memory. The paper's factors for an encoder with a decoder are not implemented.
    """

    reference = Reference(
        "weights of values, outputs and feed-forward times (4 B)^(-1/4)",
        "arXiv 2203.00555, figure 2",
        "torchscale, deepnorm=True",
    )

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        self.factor = required(place).branches ** 0.25

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(self.factor * x + apply(f, x)).astype(x.dtype)

    @classmethod
    def branch_gain(cls, place: Place | None) -> float:
        return (4 * required(place).branches) ** -0.25


class SubNorm(PreNorm):
    """x' = x + F(LN x), F with a second norm before its last matrix.

    Attention to a memory has no second norm and starts as usual (torchscale). B: see `DeepNorm`.
    """

    reference = Reference(
        "weights of values, outputs and feed-forward times sqrt(ln B)",
        "arXiv 2210.06423 (Magneto)",
        "torchscale, subln=True",
    )
    has_inner_norm = True

    @classmethod
    def branch_gain(cls, place: Place | None) -> float:
        return math.sqrt(math.log(required(place).branches))


class _ScaledByDepth(Normed):
    """x' = x + F(LN x) / m^exponent, m = L / L0, and the layers' rate times m^(exponent - 1).

    The exponent is alpha in arXiv 2505.01618, whose rules by width (muP) are not implemented.
    """

    norms_branch = True
    exponent: ClassVar[float]

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        share = config.base_depth / required(place).layers  # 1 / m
        self.factor = self.epsilon_scale = share**self.exponent
        self.rate_scale = share ** (1 - self.exponent)

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.factor * apply(f, self.norm(x), x)).astype(x.dtype)


class CompleteP(_ScaledByDepth):
    """x' = x + F(LN x) / m, m = L / L0.

    The reference code divides the epsilon of every parameter, including embedding and head.
    """

    reference = Reference(
        "Adam's epsilon of the layers' parameters / m",
        "arXiv 2505.01618, eq. 1 and Table 1 with alpha = 1",
        "EleutherAI/nanoGPT-mup, branch completep",
    )
    exponent = 1.0


class DepthMuP(_ScaledByDepth):
    """x' = x + F(LN x) / sqrt(m), m = L / L0."""

    reference = Reference(
        "rate (except SGD's) and Adam's epsilon of the layers' parameters / sqrt(m)",
        "arXiv 2310.02244; 2505.01618, Table 1 with alpha = 1/2",
        "EleutherAI/nanoGPT-mup, branch completep",
    )
    exponent = 0.5


class LayerScale(ReZeroNorm):
    """x' = x + alpha * F(LN x), one alpha per channel."""

    reference = Reference(
        "alpha 0.1 to depth 18, 1e-5 to 24, 1e-6 beyond",
        "arXiv 2103.17239 (CaiT), section 2",
        "timm, Block(init_values=...)",
    )
    shares_gate = False
    per_channel = True

    @classmethod
    def alpha_start(cls, place: Place | None) -> float:
        layers = required(place).layers
        return 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6
