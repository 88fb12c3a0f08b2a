"""The idea: one scalar gate per residual branch, starting at zero; and every rule it competes with.

A *rule* says how the output of a branch F joins the trunk x. `rezero.py` holds ReZero and the rules
without a norm, `normed.py` those that place norms, `by_depth.py` those whose numbers depend on the
depth, `streams.py` those with more than one trunk. docs/schemes.md lists all, by equation, initial
values, cost and source. Table 1 of the paper lists seven:

    plain       x' = F(x)
    residual    x' = x + F(x)
    norm        x' = Norm(F(x))
    pre_norm    x' = x + F(Norm(x))
    post_norm   x' = Norm(x + F(x))
    gpt2_norm   x' = x + Norm(F(x))
    rezero      x' = x + alpha F(x)        alpha a learned scalar, 0 at the start (eq. 1)

Each rule is a module called with the trunk and the branch, `rule(x, f)`, so that the sublayers of
one layer can share a gate. The trunk keeps its dtype, and a model's is float32 even where it
computes in bfloat16: a bfloat16 sum keeps 8 bits, and loses alpha F(x) while alpha is small. To
gate a module of your own, wrap it: `ReZero(f)`.
"""

from rezero_jax.residual.make import GATES, RULES, make_rule, rule_class
from rezero_jax.residual.normed import (
    GPT2Norm,
    LayerScale,
    Norm,
    PeriNorm,
    PostNorm,
    PreNorm,
    ReZeroNorm,
)
from rezero_jax.residual.norms import make_norm
from rezero_jax.residual.rezero import (
    TRUNK_DTYPE,
    Alpha,
    Branch,
    Gated,
    Plain,
    Residual,
    ReZero,
    ReZeroChannel,
    ReZeroRule,
    scale,
    trunk_dtype,
)
from rezero_jax.residual.rule import Constant, Place, Rule
from rezero_jax.residual.streams import Mix

__all__ = [
    "GATES",
    "RULES",
    "TRUNK_DTYPE",
    "Alpha",
    "Branch",
    "Constant",
    "GPT2Norm",
    "Gated",
    "LayerScale",
    "Mix",
    "Norm",
    "PeriNorm",
    "Place",
    "Plain",
    "PostNorm",
    "PreNorm",
    "ReZero",
    "ReZeroChannel",
    "ReZeroNorm",
    "ReZeroRule",
    "Residual",
    "Rule",
    "make_norm",
    "make_rule",
    "rule_class",
    "scale",
    "trunk_dtype",
]
