"""Writes docs/schemes.md, the table of all residual rules, from the rules themselves.

python -m rezero_jax.models.schemes > docs/schemes.md
"""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from rezero_jax import devices
from rezero_jax.models.transformer.layer import EncoderLayer
from rezero_jax.residual import RULES, Place

WIDTH, HEADS, LAYERS = 256, 4, 12
# What only moves or names numbers.
FREE = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
}


HEAD = f"""# Residual schemes

Every rule that `model.residual` may name. x is the trunk, F the branch, LN a LayerNorm or what
`model.norm` names: `layer_norm`, or `dyt`, gamma tanh(a x) + beta with a = 0.5 at first (arXiv
2503.10622). l = 1 .. L is the layer, and B the number of branches in the network: L in an MLP, 2 L
in a Transformer, 3 L where its layers attend to a memory too.

Parameters and operations are those that an encoder layer of width {WIDTH}, which has two branches,
has beyond one under `residual`. Operations are floating-point operations of a forward pass, for
each position.

| name | rule | initial values | parameters | operations | source | reference code |
| --- | --- | --- | --- | --- | --- | --- |
"""
FOOT = """
- MLPs take every rule but `sub_norm`, which needs a branch of two matrices. ResNets have rules of
  their own; see [models](models.md).
- `alpha_init` replaces the initial alpha. Every alpha is an `Alpha`, of an optimizer group without
  weight decay. In a Transformer one alpha serves all branches of a layer, unless `alpha_per` says
  `sublayer`; `layerscale` has one vector for each branch, as in CaiT.
- `fold_alpha` multiplies the alphas of `rezero`, `rezero_channel`, `rezero_norm` and `layerscale`
  into the weights. That of `gated` cannot be folded, and the other rules have none.
- `completep` divides Adam's epsilon (`adamw`, `lamb`) of the layers' parameters by m too. L0 is
  `model.base_depth`. Learning rates and weight decay do not depend on the depth.
- lambda and mu of `x0_scalars`, the static numbers of `hyper_connections`, and a and b of `mhc`
  belong to the alphas' optimizer group.
- In a network of your own, a rule by depth needs to know its place:
  `EncoderLayer(64, 4, residual="deep_norm", place=Place(layer=1, layers=12), rngs=rngs)`.

`python -m rezero_jax.models.schemes` writes this page.
"""


def page() -> str:
    """The content of docs/schemes.md."""
    parameters, operations = _cost("residual")
    rows = []
    for name, rule in RULES.items():
        own_parameters, own_operations = _cost(name)
        doc = (inspect.getdoc(rule) or "").splitlines()[0].rstrip(".")
        cells = (
            f"`{name}`",
            doc.replace("|", "\\|"),
            rule.about.start,
            f"{own_parameters - parameters:,}",
            f"{own_operations - operations:,}",
            rule.about.paper,
            rule.about.code,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n" + FOOT


def _cost(rule: str) -> tuple[int, int]:
    """Parameters of an encoder layer, and its operations for each position."""
    options: dict[str, Any] = {"residual": rule, "place": Place(1, LAYERS)}
    layer = nnx.eval_shape(lambda: EncoderLayer(WIDTH, HEADS, **options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    x = jax.eval_shape(RULES[rule].enter, jax.ShapeDtypeStruct((1, 1, WIDTH), jnp.float32))
    with devices.counting():
        jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    return sum(sizes), _operations(jaxpr.jaxpr)


def _operations(jaxpr: core.Jaxpr) -> int:
    """Two for each product of a matrix product, else one for each number that an operation makes.

    A reduction has one for each number that it takes.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [v for v in equation.params.values() if isinstance(v, core.ClosedJaxpr)]
        if inner:
            turns = equation.params["length"] if name == "scan" else 1
            total += turns * sum(_operations(sub.jaxpr) for sub in inner)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            out: Any = equation.outvars[0].aval
            total += 2 * math.prod(left.shape[i] for i in contracted) * math.prod(out.shape)
        elif name not in FREE:
            arrays: list[Any] = equation.invars if name.startswith("reduce_") else equation.outvars
            total += math.prod(arrays[0].aval.shape)
    return total


if __name__ == "__main__":
    print(page(), end="")
