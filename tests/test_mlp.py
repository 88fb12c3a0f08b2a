"""The fully connected network: parity with PyTorch, initial distributions, counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from rezero_jax import MLP
from rezero_jax.config import base_config
from rezero_jax.errors import UserError
from rezero_jax.training.optim import make_optimizer
from rezero_jax.training.state import model_spec
from tests.families import assert_trees_close, drawn, normal, stored, under


@pytest.mark.guarantee("PyTorch parity")
@pytest.mark.parametrize(
    "rule",
    ["norm", "rezero", *(pytest.param(r, marks=pytest.mark.slow) for r in ("plain", "residual"))],
)
def test_same_logits_gradients_and_updates_as_pytorch(rule):
    arrays = traverse_util.unflatten_dict(under(f"{rule}/", stored("mlp")), sep="/")

    def make(rngs):
        return MLP(12, 6, 5, 4, rule, rngs=rngs)

    structure = model_spec(make)
    params = jax.tree.map(jnp.asarray, arrays["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, structure.shapes)

    def loss(params):
        logits = structure.model(params, {})(jnp.asarray(arrays["images"]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, arrays["labels"])
        return losses.mean(), logits

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), grads = value_and_grad(params)
    np.testing.assert_allclose(logits, arrays["logits"], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
    assert_trees_close(grads, arrays["grads"], rtol=1e-4, atol=2e-6)

    optimizer, _ = make_optimizer(base_config().optim, 3, structure)
    opt_state = optimizer.init(params)
    for _ in range(3):
        _, grads = value_and_grad(params)
        updates, opt_state = jax.jit(optimizer.update)(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    # Adagrad moves an entry by about the learning rate, however small its gradient, so rounding in
    # a gradient near zero shows; agreement to 1 % of the rate. tests/test_optim.py is sharper.
    assert_trees_close(params, arrays["updated"], rtol=0, atol=0.01 * 0.01)


def test_parameter_counts_of_the_papers_networks():
    for rule, extra in (("plain", 0), ("norm", 2 * 256), ("rezero", 1)):
        spec = model_spec(lambda rngs, rule=rule: MLP(3072, 256, 32, 10, rule, rngs=rngs))
        assert spec.parameter_count == 2_894_602 + 32 * extra, rule
    deepest = model_spec(lambda rngs: MLP(3072, 150, 10_000, 10, rngs=rngs))
    assert deepest.parameter_count == 226_972_460


@pytest.mark.parametrize("rule", ["residual", "rezero", "deep_norm"])
def test_initial_distributions(rule):
    model = MLP(300, 200, 40, 100, rule, rngs=nnx.Rngs(0))
    variance = {"residual": 0.25, "deep_norm": 2.0 / np.sqrt(4 * 40)}.get(rule, 2.0)
    hidden = np.asarray(model.trunk.blocks.linear.kernel[...])
    np.testing.assert_allclose(hidden.var(axis=(1, 2)) * 200, variance, rtol=0.05)
    assert not np.array_equal(hidden[0], hidden[1])
    # Normal, not uniform nor truncated: the fourth moment is three times the variance squared.
    np.testing.assert_allclose((hidden**4).mean() / hidden.var() ** 2, 3.0, rtol=0.03)
    stem = np.asarray(model.stem.kernel[...])
    np.testing.assert_allclose(stem.var() * 300, 2.0, rtol=0.03)
    for bias, fan_in in (
        (model.stem.bias, 300),
        (model.trunk.blocks.linear.bias, 200),
        (model.head.bias, 200),
        (model.head.kernel, 200),
    ):
        scaled = np.asarray(bias[...]) * np.sqrt(fan_in)
        assert 0.9 < np.abs(scaled).max() <= 1.0
        if bias.size > 1000:
            np.testing.assert_allclose(scaled.var(), 1 / 3, rtol=0.05)


def test_unbatched_and_many_batch_axes_agree():
    model = drawn(partial(MLP, 12, 16, 3, 4))
    x = normal((2, 3, 12))
    many, one = nnx.jit(lambda model, x: (model(x), model(x[1, 2])))(model, x)
    np.testing.assert_allclose(many[1, 2], one, rtol=1e-5, atol=1e-6)


def test_wrong_sizes_and_options_are_user_errors():
    names = ("in_features", "width", "depth", "out_features")
    for name in names:
        sizes = dict(zip(names, (12, 8, 2, 4), strict=True)) | {name: 0}
        with pytest.raises(UserError, match=f"{name} is 0"):
            MLP(**sizes, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="sub_norm"):
        MLP(12, 8, 2, 4, "sub_norm", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="weight_variance"):
        MLP(12, 8, 2, 4, weight_variance=-1.0, rngs=nnx.Rngs(0))
