"""Rules that are the same in every layer: the seven of the paper's Table 1, then later ones.

LN is a float32 LayerNorm with PyTorch's epsilon, as in the authors' code, or what `norm` names.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.residual.rule import Alpha, Branch, Place, Reference, Rule, RuleConfig, apply, scale


class Plain(Rule):
    """x' = F(x)."""

    reference = Reference("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return apply(f, x).astype(x.dtype)


class Residual(Rule):
    """x' = x + F(x)."""

    reference = Reference("", "arXiv 1512.03385, eq. 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + apply(f, x).astype(x.dtype)


class Normed(Rule):
    """A rule with one norm."""

    has_norm = True

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        self.norm = config.make_norm(features, rngs=rngs)


class Norm(Normed):
    """x' = LN(F(x))."""

    reference = Reference("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(apply(f, x)).astype(x.dtype)


class PreNorm(Normed):
    """x' = x + F(LN x)."""

    reference = Reference("", "arXiv 2002.04745, Table 1", "torch.nn, norm_first=True")
    norms_branch = True

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + apply(f, self.norm(x), x)).astype(x.dtype)


class PostNorm(Normed):
    """x' = LN(x + F(x))."""

    reference = Reference("", "arXiv 1706.03762, section 3.1", "torch.nn, norm_first=False")

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(x + apply(f, x)).astype(x.dtype)


class GPT2Norm(Normed):
    """x' = x + LN(F(x)).

    The paper calls this rule "GPT2-Norm"; the GPT-2 model itself is pre-norm.
    """

    reference = Reference("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.norm(apply(f, x))).astype(x.dtype)


class PeriNorm(Normed):
    """x' = x + LN F(LN x)."""

    reference = Reference("", "arXiv 2502.02732", "")
    norms_branch = True

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        self.norm_out = config.make_norm(features, rngs=rngs)

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.norm_out(apply(f, self.norm(x), x))).astype(x.dtype)


class Orthogonal(Normed):
    """x' = x + F - x <x, F> / (|x|^2 + 1e-6), F = F(LN x).

    Adds the component of F that is orthogonal to the trunk, over the features of each position.
    """

    reference = Reference("", "arXiv 2505.11881, feature-wise", "BootsofLagrangian/ortho-residual")
    norms_branch = True

    def __call__(self, x: Array, f: Branch) -> Array:
        fx = apply(f, self.norm(x), x).astype(x.dtype)
        along = (x * fx).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-6)
        return x + (fx - along * x)


class GatedRule(Rule):
    """A rule with a gate, which starts at 0 unless the config has an `alpha_init`."""

    shares_gate = True
    per_channel = False

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        start = self.alpha_start(place) if config.alpha_init is None else config.alpha_init
        self.alpha = Alpha(jnp.full((features,) if self.per_channel else (), start, jnp.float32))

    @classmethod
    def alpha_start(cls, place: Place | None) -> float:
        """The rule's own initial gate."""
        return 0.0


class ReZeroRule(GatedRule):
    """x' = x + alpha F(x)."""

    reference = Reference("alpha 0", "arXiv 2003.04887, eq. 1", "majumderb/rezero")

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + scale(self.alpha[...], apply(f, x)).astype(x.dtype)


class ReZeroChannel(ReZeroRule):
    """x' = x + alpha * F(x), one alpha per channel."""

    reference = Reference("alpha 0", "arXiv 2003.04887, eq. 1, per channel", "")
    per_channel = True


class Gated(GatedRule):
    """x' = (1 - alpha) x + alpha F(x)."""

    reference = Reference("alpha 0", "arXiv 2003.04887, section 2.3", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        fx, alpha = apply(f, x), self.alpha[...]
        return (scale(1 - alpha, x) + scale(alpha, fx)).astype(x.dtype)


class ReZeroNorm(ReZeroRule):
    """x' = x + alpha F(LN x)."""

    reference = Reference("alpha 0", "arXiv 2102.11972, a baseline", "majumderb/rezero, issue 4")
    has_norm = norms_branch = True

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        super().__init__(config, features, place, rngs)
        self.norm = config.make_norm(features, rngs=rngs)

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + scale(self.alpha[...], apply(f, self.norm(x), x))).astype(x.dtype)
