"""The rules that differ in where a norm stands: on the branch's way in, on its way out, after all.

LN is a float32 LayerNorm with PyTorch's epsilon, as in the authors' code, or what `norm` names.
"""

from jax import Array

from rezero_jax.residual.rezero import ReZeroRule, scale
from rezero_jax.residual.rule import About, Branch, Rule, Site, apply, required


class Normed(Rule):
    """A rule with one norm."""

    has_norm = True

    def __init__(self, site: Site):
        self.norm = site.new_norm()


class Norm(Normed):
    """x' = LN(F(x))."""

    about = About("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(apply(f, x, x)).astype(x.dtype)


class PreNorm(Normed):
    """x' = x + F(LN x)."""

    about = About("", "arXiv 2002.04745, Table 1", "torch.nn, norm_first=True")
    norms_branch = True

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + apply(f, self.norm(x), x)).astype(x.dtype)


class PostNorm(Normed):
    """x' = LN(x + F(x))."""

    about = About("", "arXiv 1706.03762, section 3.1", "torch.nn, norm_first=False")

    def __call__(self, x: Array, f: Branch) -> Array:
        return self.norm(x + apply(f, x, x)).astype(x.dtype)


class GPT2Norm(Normed):
    """x' = x + LN(F(x)).

    The paper's "GPT2-Norm"; the GPT-2 model itself is pre-norm.
    """

    about = About("", "arXiv 2003.04887, Table 1", "")

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.norm(apply(f, x, x))).astype(x.dtype)


class PeriNorm(Normed):
    """x' = x + LN F(LN x).

    Each side has a norm of its own.
    """

    about = About("", "arXiv 2502.02732", "")
    norms_branch = True

    def __init__(self, site: Site):
        super().__init__(site)
        self.norm_out = site.new_norm()

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + self.norm_out(apply(f, self.norm(x), x))).astype(x.dtype)


class Orthogonal(Normed):
    """x' = x + F - x <x, F> / (|x|^2 + 1e-6), F = F(LN x).

    What of the branch is orthogonal to the trunk, over the features of each position.
    """

    about = About("", "arXiv 2505.11881, feature-wise", "BootsofLagrangian/ortho-residual")
    norms_branch = True

    def __call__(self, x: Array, f: Branch) -> Array:
        fx = apply(f, self.norm(x), x).astype(x.dtype)
        along = (x * fx).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-6)
        return x + (fx - along * x)


class ReZeroNorm(ReZeroRule):
    """x' = x + alpha F(LN x)."""

    about = About("alpha 0", "arXiv 2102.11972, as a rival", "majumderb/rezero, issue 4")
    has_norm = norms_branch = True

    def __init__(self, site: Site):
        super().__init__(site)
        self.norm = site.new_norm()

    def __call__(self, x: Array, f: Branch) -> Array:
        return (x + scale(self.alpha[...], apply(f, self.norm(x), x))).astype(x.dtype)


class LayerScale(ReZeroNorm):
    """x' = x + alpha * F(LN x), one alpha per channel."""

    about = About(
        "alpha 0.1 to depth 18, 1e-5 to 24, 1e-6 beyond",
        "arXiv 2103.17239 (CaiT), section 2",
        "timm, Block(init_values=...)",
    )
    per_channel = True

    def alpha_start(self, site: Site) -> float:
        layers = required(site.place).layers
        return 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6
