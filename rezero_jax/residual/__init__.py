"""The idea, one gate per residual branch that starts at zero, and the rules it competes with.

A *rule* is how the output of a branch F joins the trunk x; ReZero's is x' = x + alpha F(x). It is a
module that is called with the trunk and the branch, `rule(x, f)`, so that the sublayers of a layer
can share a gate. docs/schemes.md lists all rules. To gate a module of your own, use `ReZero(f)`.

The trunk keeps its dtype, and a model's trunk is float32 even if the model computes in bfloat16: a
bfloat16 sum keeps 8 bits, and loses alpha F(x) while alpha is small.
"""

from rezero_jax.residual import by_depth, rules, streams
from rezero_jax.residual.rule import RULES as RULES
from rezero_jax.residual.rule import AdaLNZero as AdaLNZero
from rezero_jax.residual.rule import Alpha as Alpha
from rezero_jax.residual.rule import Branch as Branch
from rezero_jax.residual.rule import Constant as Constant
from rezero_jax.residual.rule import DyT as DyT
from rezero_jax.residual.rule import Place as Place
from rezero_jax.residual.rule import ReZero as ReZero
from rezero_jax.residual.rule import Rule as Rule
from rezero_jax.residual.rule import RuleConfig as RuleConfig
from rezero_jax.residual.rule import make_rule as make_rule
from rezero_jax.residual.rule import trunk_dtype as trunk_dtype
from rezero_jax.residual.streams import StreamWeight as StreamWeight

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
    rezero_norm=rules.ReZeroNorm,
    layerscale=by_depth.LayerScale,
    peri_norm=rules.PeriNorm,
    layernorm_scaling=by_depth.LayerNormScaling,
    deep_norm=by_depth.DeepNorm,
    sub_norm=by_depth.SubNorm,
    completep=by_depth.CompleteP,
    depth_mup=by_depth.DepthMuP,
    orthogonal=rules.Orthogonal,
    x0_scalars=streams.X0Scalars,
    hyper_connections=streams.HyperConnections,
    mhc=streams.ManifoldHyperConnections,
)
