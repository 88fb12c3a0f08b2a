"""The rules by name."""

from flax import nnx

from rezero_jax.errors import choose_from
from rezero_jax.residual.by_depth import CompleteP, DeepNorm, DepthMuP, LayerNormScaling, SubNorm
from rezero_jax.residual.normed import (
    GPT2Norm,
    LayerScale,
    Norm,
    Orthogonal,
    PeriNorm,
    PostNorm,
    PreNorm,
    ReZeroNorm,
)
from rezero_jax.residual.rezero import Gated, Plain, Residual, ReZeroChannel, ReZeroRule
from rezero_jax.residual.rule import Place, Rule, Site
from rezero_jax.residual.streams import HyperConnections, ManifoldHyperConnections, X0Scalars

RULES: dict[str, type[Rule]] = {
    "plain": Plain,
    "residual": Residual,
    "norm": Norm,
    "pre_norm": PreNorm,
    "post_norm": PostNorm,
    "gpt2_norm": GPT2Norm,
    "rezero": ReZeroRule,
    "gated": Gated,
    "rezero_channel": ReZeroChannel,
    "rezero_norm": ReZeroNorm,
    "layerscale": LayerScale,
    "peri_norm": PeriNorm,
    "layernorm_scaling": LayerNormScaling,
    "deep_norm": DeepNorm,
    "sub_norm": SubNorm,
    "completep": CompleteP,
    "depth_mup": DepthMuP,
    "orthogonal": Orthogonal,
    "x0_scalars": X0Scalars,
    "hyper_connections": HyperConnections,
    "mhc": ManifoldHyperConnections,
}
GATES = ("rezero", "gated", "rezero_channel", "rezero_norm")  # whose alpha starts at 0


def rule_class(name: str) -> type[Rule]:
    """The class of the rule called `name`.

    Raises:
      UserError: no rule is called `name`.
    """
    if name not in RULES:
        raise choose_from("residual rule", name, RULES)
    return RULES[name]


def make_rule(
    name: str,
    features: int,
    *,
    place: Place | None = None,
    alpha_init: float | None = None,
    norm: str = "layer_norm",
    base_depth: int = 2,
    rngs: nnx.Rngs,
) -> Rule:
    """The rule called `name`.

    Args:
      name: one of RULES.
      features: size of the trunk's last axis.
      place: where the branch stands, for the rules that depend on it.
      alpha_init: initial gate, where the rule has one; by default the rule's own.
      norm: "layer_norm" or "dyt" (arXiv 2503.10622), wherever the rule has a norm.
      base_depth: the depth L0 at which `completep` and `depth_mup` are x + F(LN x).

    Raises:
      UserError: no rule or norm is called so, or the rule needs a place.
    """
    return rule_class(name)(Site(features, rngs, place, alpha_init, norm, base_depth))
