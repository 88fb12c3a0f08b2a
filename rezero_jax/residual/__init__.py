"""The idea: one scalar gate per residual branch, starting at zero; and the rules it competes with.

A *rule* is how the output of a branch F joins the trunk x: ReZero's is x' = x + alpha F(x), and
alpha is multiplied in `scale` (`rule.py`). `rules.py` has the seven rules of the paper's Table 1
with their equations, `normed.py` later rules with norms, `by_depth.py` rules that depend on the
depth, and `streams.py` rules with several trunks. docs/schemes.md lists all of them with initial
values, cost and source.

Each rule is a module called with the trunk and the branch, `rule(x, f)`, so that the sublayers of
one layer can share a gate. The trunk keeps its dtype, and a model's trunk is float32 even if the
model computes in bfloat16: a bfloat16 sum keeps 8 bits, and loses alpha F(x) while alpha is small.
To gate a module of your own, wrap it: `ReZero(f)`.
"""

from rezero_jax.residual import by_depth, normed, rules, streams
from rezero_jax.residual.rule import (
    RULES,
    TRUNK_DTYPE,
    Alpha,
    Branch,
    Constant,
    DyT,
    Place,
    Reference,
    ReZero,
    Rule,
    RuleConfig,
    apply,
    make_rule,
    rule_class,
    scale,
    trunk_dtype,
)
from rezero_jax.residual.streams import StreamWeight

RULES.update(
    plain=rules.Plain,
    residual=rules.Residual,
    norm=rules.Norm,
    pre_norm=rules.PreNorm,
    post_norm=rules.PostNorm,
    gpt2_norm=rules.GPT2Norm,
    rezero=rules.ReZeroRule,
    gated=rules.Gated,
    rezero_channel=rules.ReZeroChannel,
    rezero_norm=normed.ReZeroNorm,
    layerscale=normed.LayerScale,
    peri_norm=normed.PeriNorm,
    layernorm_scaling=by_depth.LayerNormScaling,
    deep_norm=by_depth.DeepNorm,
    sub_norm=by_depth.SubNorm,
    completep=by_depth.CompleteP,
    depth_mup=by_depth.DepthMuP,
    orthogonal=normed.Orthogonal,
    x0_scalars=streams.X0Scalars,
    hyper_connections=streams.HyperConnections,
    mhc=streams.ManifoldHyperConnections,
)

__all__ = [
    "RULES",
    "TRUNK_DTYPE",
    "Alpha",
    "Branch",
    "Constant",
    "DyT",
    "Place",
    "ReZero",
    "Reference",
    "Rule",
    "RuleConfig",
    "StreamWeight",
    "apply",
    "make_rule",
    "rule_class",
    "scale",
    "trunk_dtype",
]
