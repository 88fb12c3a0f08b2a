"""The seven rules of the paper's Table 1, and two relatives of ReZero with other gates.

    plain             x' = F(x)
    residual          x' = x + F(x)
    norm              x' = LN(F(x))
    pre_norm          x' = x + F(LN x)
    post_norm         x' = LN(x + F(x))
    gpt2_norm         x' = x + LN(F(x))
    rezero            x' = x + alpha F(x)                    alpha a learned scalar, 0 at the start
    rezero_channel    x' = x + alpha * F(x)                  one alpha per channel
    gated             x' = (1 - alpha) x + alpha F(x)

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
        return apply(f, x, x).astype(x.dtype)


class Residual(Rule):
    """x' = x + F(x)."""

    reference = Reference("", "arXiv 1512.03385, eq. 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return x + apply(f, x, x).astype(x.dtype)


class Normed(Rule):
    """A rule with one norm."""

    has_norm = True

    def __init__(self, config: RuleConfig, features: int, place: Place | None, rngs: nnx.Rngs):
        self.norm = config.make_norm(features, rngs=rngs)


class Norm(Normed):
    """x' = LN(F(x))."""

    reference = Reference("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(apply(f, x, x)).astype(x.dtype)


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
        return self.norm(x + apply(f, x, x)).astype(x.dtype)


class GPT2Norm(Normed):
    """x' = x + LN(F(x)).

    The paper calls this rule "GPT2-Norm"; the GPT-2 model itself is pre-norm.
    """

    reference = Reference("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.norm(apply(f, x, x))).astype(x.dtype)


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
        return x + scale(self.alpha[...], apply(f, x, x)).astype(x.dtype)


class ReZeroChannel(ReZeroRule):
    """x' = x + alpha * F(x), one alpha per channel."""

    reference = Reference("alpha 0", "arXiv 2003.04887, eq. 1, per channel", "")
    per_channel = True


class Gated(GatedRule):
    """x' = (1 - alpha) x + alpha F(x).

    The gate opens the branch and closes the trunk.
    """

    reference = Reference("alpha 0", "arXiv 2003.04887, section 2.3", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        fx, alpha = apply(f, x, x), self.alpha[...]
        return (scale(1 - alpha, x) + scale(alpha, fx)).astype(x.dtype)
