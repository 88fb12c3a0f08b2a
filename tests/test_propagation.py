"""Signals and gradients by depth, against closed forms and against running the layers by hand."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax import ResNet, ReZero, Stack, Transformer
from rezero_jax.analysis.ablation import ablate
from rezero_jax.analysis.propagation import propagate, random_projection, trunk
from rezero_jax.errors import UserError
from rezero_jax.residual import RuleConfig, make_rule
from tests.families import drawn

X = jax.random.normal(jax.random.key(0), (4, 6))


class Scaled(nnx.Module):
    """f(x) = w x."""

    def __init__(self, w):
        self.w = nnx.Param(jnp.float32(w))

    def __call__(self, x):
        return self.w * x


class Joined(nnx.Module):
    """A linear branch, joined by a rule."""

    def __init__(self, residual, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.rule = make_rule(RuleConfig(residual, alpha_init=0.3), 6, rngs=rngs)

    def __call__(self, x):
        return self.rule(x, lambda x: jnp.tanh(self.linear(x)))


def test_the_papers_toy_model_grows_by_one_plus_alpha_w():
    """x_L = (1 + alpha w)^L x_0 (paper, eq. 5), and the gradient likewise on its way back."""
    stack = Stack(lambda _: ReZero(Scaled(0.4), 0.5), 7, rngs=nnx.Rngs(0))
    for alpha in (0.5, 0.0):  # at 0, as at the start, ReZero passes the signal unchanged
        stack.blocks.alpha[...] = jnp.full(7, alpha)
        found = propagate(stack, X)
        growth = (1 + 0.4 * alpha) ** np.arange(8)
        signal = np.linalg.norm(X, axis=1).mean()
        np.testing.assert_allclose(found.signal, signal * growth, rtol=1e-5)
        np.testing.assert_allclose(found.gradient / found.gradient[-1], growth[::-1], rtol=1e-5)
        np.testing.assert_allclose(found.share, 0.4 * alpha, rtol=1e-5)
        np.testing.assert_allclose(found.cosine, found.cosine[0], rtol=1e-5)
        np.testing.assert_array_equal(found.alpha, alpha)
        np.testing.assert_array_equal(found.idle, alpha == 0)
    assert np.isnan(propagate(stack, X[:1]).cosine).all()  # one example has no angle


@pytest.mark.parametrize(("residual", "scan"), [("rezero_channel", False), ("post_norm", True)])
def test_every_number_is_that_of_running_the_layers_by_hand(residual, scan):
    stack = Stack(partial(Joined, residual), 3, scan=scan, rngs=nnx.Rngs(1))
    found = propagate(stack, X)
    assert found.names == ("model.0", "model.1", "model.2")
    layers = stack.layers()
    xs = [X]
    for layer in layers:
        xs.append(layer(xs[-1]))

    def loss_from(point, x):
        for layer in layers[point:]:
            x = layer(x)
        return random_projection(lambda x: x, x).sum()

    def norm(x):
        return np.linalg.norm(x, axis=1)

    gradients = [norm(jax.grad(partial(loss_from, i))(x)).mean() for i, x in enumerate(xs)]
    unit = [x / norm(x)[:, None] for x in xs]
    cosines = [(u * np.roll(u, -1, axis=0)).sum(1).mean() for u in unit]
    shares = [(norm(b - a) / norm(a)).mean() for a, b in itertools.pairwise(xs)]
    np.testing.assert_allclose(found.signal, [norm(x).mean() for x in xs], rtol=1e-5)
    np.testing.assert_allclose(found.gradient, gradients, rtol=1e-5)
    np.testing.assert_allclose(found.cosine, cosines, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.share, shares, rtol=1e-5)
    np.testing.assert_allclose(found.alpha, np.nan if residual == "post_norm" else 0.3)

    def mean_loss(layer, x, i):
        return loss_from(i + 1, layer(x)) / len(X)

    of_weights = [
        jax.tree.leaves(jax.grad(mean_loss)(layer, xs[i], i)) for i, layer in enumerate(layers)
    ]
    norms = [np.sqrt(sum((leaf**2).sum() for leaf in leaves)) for leaves in of_weights]
    np.testing.assert_allclose(found.weight_gradient, norms, rtol=1e-4)


def test_a_language_model_and_its_trunk():
    def loss(model, tokens):
        return model.losses(tokens, tokens).mean(axis=1)

    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 7)
    model = drawn(partial(Transformer, 7, 4, 2, 2, 5, alpha_per="sublayer"), alpha=0.2)
    found = propagate(model, tokens, loss)
    assert found.names == ("trunk.layers.0", "trunk.layers.1")
    np.testing.assert_allclose(found.alpha, 0.2)
    f, entered = trunk(model, tokens, loss)
    signal = np.linalg.norm(entered.reshape(3, -1), axis=1).mean()
    np.testing.assert_allclose(found.signal[0], signal, rtol=1e-5)
    left = jax.jit(f)(entered)
    np.testing.assert_allclose(left, jax.jit(lambda: model.hidden(tokens))(), rtol=1e-5, atol=1e-6)


def test_the_stages_of_a_resnet_in_order():
    model = drawn(partial(ResNet.cifar, 8, width=2), alpha=0.5)
    before = [np.array(leaf) for leaf in jax.tree.leaves(model)]
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    found = propagate(model, images)
    assert found.names == ("stages.0.rest.0", "stages.1.entry", "stages.2.entry")
    np.testing.assert_array_equal(np.isnan(found.share), [False, True, True])
    np.testing.assert_array_equal(found.idle, False)
    np.testing.assert_allclose(found.alpha, 0.5)
    assert np.isfinite(found.signal).all()
    assert (found.gradient > 0).all()
    for leaf, old in zip(jax.tree.leaves(model), before, strict=True):  # in training mode, too
        np.testing.assert_array_equal(leaf, old)
    model.eval()
    assert ablate(model, images, random_projection).names == found.names[:1]


def test_layers_of_a_module_are_in_the_order_in_which_they_run():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.b_first = ReZero(Scaled(1.0), 0.5)
            self.a_second = nnx.List([Joined("rezero", rngs), nnx.Linear(6, 6, rngs=rngs)])

        def __call__(self, x):
            layer, linear = self.a_second
            return linear(layer(self.b_first(x)))

    found = propagate(nnx.jit(lambda: Own(nnx.Rngs(0)))(), X)
    assert found.names == ("b_first", "a_second.0")
    np.testing.assert_allclose(found.share[0], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found.alpha, [0.5, 0.3])
    assert propagate(ReZero(Scaled(1.0)), X).names == ("model",)


def test_models_that_cannot_be_measured_are_refused():
    with pytest.raises(UserError, match="no layers were found in the Linear; put its blocks"):
        propagate(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), X)

    class Twice(nnx.Module):
        def __init__(self):
            self.layer = ReZero(Scaled(1.0))

        def __call__(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(UserError, match=r"^layer runs more than once"):
        propagate(Twice(), X)
