"""Later rules with norms: a norm on both sides of the branch, or a norm and a gate."""

from flax import nnx
from jax import Array

from rezero_jax.residual.rule import Branch, Place, Reference, RuleConfig, apply, required, scale
from rezero_jax.residual.rules import Normed, ReZeroRule


class PeriNorm(Normed):
    """x' = x + LN F(LN x).

    Each side has a norm of its own.
    """

    reference = Reference("", "arXiv 2502.02732", "")
    norms_branch = True

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        self.norm_out = config.make_norm(features, rngs=rngs)

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.norm_out(apply(f, self.norm(x), x))).astype(x.dtype)


class Orthogonal(Normed):
    """x' = x + F - x <x, F> / (|x|^2 + 1e-6), F = F(LN x).

    Adds the component of the branch that is orthogonal to the trunk, over the features of each
    position.
    """

    reference = Reference("", "arXiv 2505.11881, feature-wise", "BootsofLagrangian/ortho-residual")
    norms_branch = True

    def __call__(self, x: Array, f: Branch) -> Array:
        fx = apply(f, self.norm(x), x).astype(x.dtype)
        along = (x * fx).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-6)
        return x + (fx - along * x)


class ReZeroNorm(ReZeroRule):
    """x' = x + alpha F(LN x)."""

    reference = Reference("alpha 0", "arXiv 2102.11972, a baseline", "majumderb/rezero, issue 4")
    has_norm = norms_branch = True

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        self.norm = config.make_norm(features, rngs=rngs)

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + scale(self.alpha[...], apply(f, self.norm(x), x))).astype(x.dtype)


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
