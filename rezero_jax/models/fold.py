"""Models without gates that compute the same: every alpha multiplied into its branch's weights.

alpha (W h + b) = (alpha W) h + alpha b, and so for a convolution or a BatchNorm's scale and bias:
after training, inference need not pay for the gates.

Three functions know what there is to fold, each by the class of its first argument:

    fold(module)              in place, the gates that the module itself holds
    folded_rule(rule, *ends)  the rule that is left once alpha is in the branches' last weights
    last_weights(end)         the parameters that scale what a branch ends in

Register the classes of your own that hold gates, or that branches end in:

    @fold.register(MyBlock)
    def _(block):
        block.rule = folded_rule(block.rule, block.out)

    @last_weights.register(MyBranch)
    def _(branch):
        return branch.out.kernel, branch.out.bias
"""

from collections import Counter
from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rezero_jax.errors import UserError
from rezero_jax.models import mlp
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.resnet.blocks import PostBlock, PreBlock, PreBottleneck, ReluInside
from rezero_jax.models.resnet.conv import Conv
from rezero_jax.models.transformer.attention import Attention
from rezero_jax.models.transformer.layer import FeedForward, TransformerLayer
from rezero_jax.residual import (
    Alpha,
    Gated,
    Residual,
    ReZero,
    ReZeroNorm,
    ReZeroRule,
    Rule,
    scale,
)

M = TypeVar("M", bound=nnx.Module)


def fold_alpha(model: M) -> M:
    """A copy of the model without gates, whose outputs are the same up to rounding.

    It can be trained further as a plain residual network; arrays that do not change are shared
    with the original.

    Args:
      model: any model of this package, or a module that holds some of them or of `ReZero(f)`,
        where f is a linear layer or convolution of Flax or is known to `last_weights`. Your own
        modules with other gates take part once they are registered with `fold`.

    Raises:
      UserError: a gate cannot be folded: it is one of `gated`, which scales the trunk too, its
        branch's last weights are unknown, or they are also used elsewhere.
    """
    folded = nnx.clone(model)
    uses = _uses(folded)
    with_gates = [m for _, m in nnx.iter_modules(folded) if nnx.state(m, Alpha)]
    for module in with_gates:
        before = [
            (v, v.get_value()) for _, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)
        ]
        fold(module)
        for v, value in before:
            if v.get_value() is not value and uses[id(v)] != uses[id(module)]:
                raise UserError(
                    f"the last weights of a {type(module).__name__} are also used elsewhere in "
                    "the model, where its gate has no place; fold a model that does not share them"
                )
    _check_folded(folded)
    return folded


@singledispatch
def fold(module: Any) -> None:
    """Folds the gates that a module itself holds, in place; does nothing for a class unknown."""


@fold.register
def _(module: ReZero) -> None:
    _scale_weights(module.alpha, module.alpha.ndim, module.f)
    module.alpha = None  # type: ignore[assignment]


@fold.register
def _(block: mlp.Block) -> None:
    block.relu = _folded_relu(block.rule)
    block.rule = folded_rule(block.rule, block.linear)


@fold.register
def _(block: PostBlock) -> None:
    end = block.conv2 if block.norm2 is nnx.identity else block.norm2
    if isinstance(block, ReluInside):
        block.relu = _folded_relu(block.rule)
    block.rule = folded_rule(block.rule, end)


@fold.register
def _(block: PreBlock) -> None:
    end = block.conv3 if isinstance(block, PreBottleneck) else block.conv2
    block.rule = folded_rule(block.rule, end)


@fold.register
def _(layer: TransformerLayer) -> None:
    cross = [layer.cross_attention] if layer.has_memory else []
    sublayers = [layer.attention, *cross, layer.feedforward]
    layer.rules = nnx.List(
        folded_rule(rule, *sublayers[i :: len(layer.rules)]) for i, rule in enumerate(layer.rules)
    )


@singledispatch
def folded_rule(rule: Rule, *ends: Any) -> Rule:
    """Multiplies the rule's gate, if it has one, into the branches' last weights.

    Args:
      *ends: what each branch that the rule joins ends in; see `last_weights`.

    Returns:
      The rule that joins the branches from now on.

    Raises:
      UserError: the gate cannot be folded, or the last weights of an end are unknown.
    """
    return rule


@folded_rule.register
def _(rule: ReZeroRule, *ends: Any) -> Rule:
    _scale_weights(rule.alpha, rule.alpha.ndim - rule.per_channel, *ends)
    if isinstance(rule, ReZeroNorm):
        rule.alpha = None  # type: ignore[assignment]
        return rule
    return Residual()


@folded_rule.register
def _(rule: Gated, *ends: Any) -> Rule:
    raise UserError(
        "the gate of `gated` scales the trunk as well as the branch, so it cannot be folded "
        "into weights; use the model as it is"
    )


@singledispatch
def last_weights(end: Any) -> tuple[nnx.Param | None, ...]:
    """The parameters in which the end of a branch is linear, with channels on their last axis.

    None stands for a bias that is not there.

    Args:
      end: a linear layer or convolution of Flax, an nnx.Sequential that ends in one, a parameter,
        or an object of a registered class.

    Raises:
      UserError: it is something else.
    """
    if type(end) in (nnx.Linear, nnx.LinearGeneral, nnx.Conv):  # a subclass may do more
        return end.kernel, end.bias
    if type(end) is nnx.Sequential:
        return last_weights(end.layers[-1])
    raise UserError(
        f"the last weights of a branch that is or ends in a {type(end).__name__} are unknown, so "
        "no gate can be folded into them; make it a module and register its class with "
        "rezero_jax.models.fold.last_weights"
    )


last_weights.register(nnx.Param, lambda end: (end,))
last_weights.register(Conv, lambda end: (end.kernel, end.bias))
last_weights.register(BatchNorm, lambda end: (end.scale, end.bias))
last_weights.register(Attention, lambda end: last_weights(end.out))
last_weights.register(FeedForward, lambda end: last_weights(end.down))


class SignedRelu(nnx.Module):
    """max(z, 0) where alpha >= 0, min(z, 0) where alpha < 0: alpha relu(z) is this of alpha z.

    It is written as a clip, whose bounds a stack can scan over.
    """

    def __init__(self, alpha: Array):
        self.low = nnx.Variable(jnp.where(alpha < 0, -jnp.inf, 0.0))
        self.high = nnx.Variable(jnp.where(alpha < 0, 0.0, jnp.inf))

    def __call__(self, z: Array) -> Array:
        low, high = (
            bound[...].astype(z.dtype).reshape((1,) * (z.ndim - bound.ndim) + bound.shape)
            for bound in (self.low, self.high)
        )
        return jnp.clip(z, low, high)


def _folded_relu(rule: Rule) -> Callable[[Array], Array]:
    """r with r(alpha z) = alpha relu(z): the ReLU that ends a branch whose gate is folded."""
    return SignedRelu(rule.alpha[...]) if isinstance(rule, ReZeroRule) else nnx.relu


def _scale_weights(alpha: Alpha, layer_axes: int, *ends: Any) -> None:
    """Multiplies alpha, stacked over its first `layer_axes` axes, into what the ends end in."""
    times = scale
    for _ in range(layer_axes):
        times = jax.vmap(times)
    for weight in (weight for end in ends for weight in last_weights(end)):
        if weight is not None:
            weight[...] = times(alpha[...], weight[...]).astype(weight.dtype)


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
                f"the gate {'.'.join(map(str, path))} cannot be folded; register the class "
                f"{type(owners[-1]).__name__} with rezero_jax.models.fold.fold, by a function "
                "that folds it into the last weights of its branch"
            )
