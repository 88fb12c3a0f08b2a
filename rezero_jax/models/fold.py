"""Models without gates that compute the same: every alpha multiplied into its branch's weights.

alpha (W h + b) = (alpha W) h + alpha b, and so for a convolution or a BatchNorm's scale and bias.
After training nothing is lost that way, and inference pays nothing for the gates.

What a block ends in is the block's knowledge: a module with gates has a method

    fold_gates()    in place, `self.rule = self.rule.fold_into(...)` for each of its own rules

and a module that is a branch, or the end of one, and that Flax did not bring along has a method

    last_weights()  the parameters that scale its output, or None for one that is not there

`rezero_jax.models.mlp.Block` and `rezero_jax.models.transformer.attention.Attention` are examples.
"""

from collections import Counter
from typing import Any, TypeVar

import jax
from flax import nnx

from rezero_jax.errors import UserError
from rezero_jax.residual import Alpha, Rule

M = TypeVar("M", bound=nnx.Module)


def fold_alpha(model: M) -> M:
    """A copy of the model without gates, whose outputs are the same up to rounding.

    It can be trained on as a plain residual network. A model without gates is copied as it is;
    arrays that do not change are shared with the original.

    Args:
      model: any model of this package, or a module that holds some of them or of `ReZero(f)`,
        where f is a linear layer or convolution of Flax or has a method `last_weights()`. Modules
        of one's own with other gates take part if they have a method `fold_gates()`.

    Raises:
      UserError: a gate cannot be folded: it is one of `gated`, which scales the trunk too, nobody
        knows which weights are its branch's last, or those are also used elsewhere.
    """
    folded = nnx.clone(model)
    uses = _uses(folded)
    gated = [
        module
        for _, module in nnx.iter_modules(folded)
        if hasattr(module, "fold_gates") and nnx.state(module, Alpha)
    ]
    for module in gated:
        variables = [v for _, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)]
        before = [v.get_value() for v in variables]
        module.fold_gates()
        for v, value in zip(variables, before, strict=True):
            if v.get_value() is not value and uses[id(v)] != uses[id(module)]:
                raise UserError(
                    f"the last weights of a {type(module).__name__} are also used elsewhere in "
                    "the model, where its gate has no place; fold a model that does not share them"
                )
    _check_folded(folded)
    return folded


def _uses(model: nnx.Module) -> Counter[int]:
    """How many paths lead to each module and variable, by id."""
    uses: Counter[int] = Counter()

    def visit(node: Any) -> bool:
        uses[id(node)] += 1
        return isinstance(node, nnx.Variable)

    jax.tree.leaves(model, is_leaf=visit)
    return uses


def _check_folded(model: nnx.Module) -> None:
    """Raises UserError if a gate is left."""
    modules = dict(nnx.iter_modules(model))
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Alpha):
            above = [modules[path[:i]] for i in range(len(path)) if path[:i] in modules]
            owners = [m for m in above if not isinstance(m, (Rule, nnx.List))] or above
            raise UserError(
                f"the gate {'.'.join(map(str, path))} cannot be folded; give the class "
                f"{type(owners[-1]).__name__} a method fold_gates() that folds it into the last "
                "weights of its branch, as rezero_jax.models.mlp.Block does"
            )
