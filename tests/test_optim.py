"""Optimizers against the formulas of PyTorch, of LAMB and of Muon; groups and schedules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rezero_jax import MLP, Alpha, ResNet, ReZero, Transformer, ViT
from rezero_jax.config import base_config, optim_group
from rezero_jax.errors import UserError
from rezero_jax.training.optim import OPTIMIZERS, make_optimizer, make_schedule
from rezero_jax.training.state import model_spec
from tests.families import flat

MODEL = model_spec(lambda rngs: MLP(4, 3, 5, 2, rngs=rngs))
RNG = np.random.default_rng(0)
slow = partial(pytest.param, marks=pytest.mark.slow)


def settings(**kwargs):
    config = base_config().optim
    config.update(kwargs)
    return config


def random_tree(shapes=MODEL.shapes):
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s.shape), jnp.float32), shapes)


def run(config, updates=4, total=10, params=None, structure=MODEL):
    """Parameters before and after, and the gradients, of a few updates."""
    optimizer, schedules = make_optimizer(config, total, structure)
    params = params or random_tree()
    history, grads, state = [params], [], optimizer.init(params)
    for _ in range(updates):
        grads.append(random_tree())
        changes, state = optimizer.update(grads[-1], state, params)
        params = optax.apply_updates(params, changes)
        history.append(params)
    return history, grads, schedules


def kernel(tree):
    return np.asarray(tree["trunk"]["blocks"]["linear"]["kernel"], np.float64)


def alpha(tree):
    return np.asarray(tree["trunk"]["blocks"]["rule"]["alpha"], np.float64)


def test_adagrad_is_pytorchs():
    history, grads, _ = run(settings(name="adagrad", learning_rate=0.1))
    p, total = kernel(history[0]), 0.0
    for g in map(kernel, grads):
        total = total + g**2
        p = p - 0.1 * g / (np.sqrt(total) + 1e-10)
    np.testing.assert_allclose(kernel(history[-1]), p, rtol=1e-5, atol=1e-6)


def test_adagrads_first_step_is_the_learning_rate_however_small_the_gradient():
    """What an epsilon inside the square root would break in the deep layers of a deep network."""
    optimizer, _ = make_optimizer(settings(name="adagrad", learning_rate=0.1), 1, MODEL)
    params = random_tree()
    for size, rtol in ((1e-3, 1e-3), (1e-6, 1e-3), (1e-9, 0.1)):
        grads = jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), params)
        changes, _ = optimizer.update(grads, optimizer.init(params), params)
        np.testing.assert_allclose(kernel(changes), -0.1 * size / (size + 1e-10), rtol=rtol)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs_with_momentum_and_decay(nesterov):
    config = settings(
        name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov
    )
    history, grads, _ = run(config)
    p, velocity = kernel(history[0]), 0.0
    for g in map(kernel, grads):
        g = g + 0.01 * p
        velocity = 0.9 * velocity + g
        p = p - 0.1 * (g + 0.9 * velocity if nesterov else velocity)
    np.testing.assert_allclose(kernel(history[-1]), p, rtol=1e-5, atol=1e-6)


def test_adamw_is_pytorchs():
    config = settings(name="adamw", learning_rate=0.1, b1=0.8, b2=0.95, weight_decay=0.01)
    history, grads, _ = run(config)
    p, m, v = kernel(history[0]), 0.0, 0.0
    for t, g in enumerate(map(kernel, grads), 1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        p = p - 0.1 * (step + 0.01 * p)
    np.testing.assert_allclose(kernel(history[-1]), p, rtol=1e-4, atol=1e-5)


def test_lamb_on_a_stack_is_lamb_layer_by_layer():
    config = settings(name="lamb", learning_rate=0.1, weight_decay=0.01)
    history, grads, _ = run(config)
    for layer in range(5):
        p, m, v = kernel(history[0])[layer], 0.0, 0.0
        for t, g in enumerate((kernel(g)[layer] for g in grads), 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + 0.01 * p
            p = p - 0.1 * step * np.linalg.norm(p) / np.linalg.norm(step)
        np.testing.assert_allclose(kernel(history[-1])[layer], p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "epsilon"), [("adamw", 1e-8), ("lamb", 1e-6)])
def test_a_gradient_of_epsilons_size_moves_half_as_far_as_a_large_one(name, epsilon):
    """Adam divides by |gradient| + epsilon in its first step; LAMB's ratio is one for a layer."""
    optimizer, _ = make_optimizer(settings(name=name, learning_rate=0.1), 1, MODEL)
    params = random_tree()
    is_small = RNG.random(kernel(params).shape) < 0.5
    grads = jax.tree.map(jnp.ones_like, params)
    grads["trunk"]["blocks"]["linear"]["kernel"] = jnp.where(is_small, epsilon, 1.0)
    changes, _ = optimizer.update(grads, optimizer.init(params), params)
    for change, small in zip(kernel(changes), is_small, strict=True):
        np.testing.assert_allclose(change[small], change[~small].mean() / 2, rtol=1e-3)
    if name == "adamw":
        np.testing.assert_allclose(kernel(changes)[is_small], -0.05, rtol=1e-3)


def test_lamb_moves_each_alpha_by_a_relative_rate_of_its_own():
    history, *_ = run(settings(name="lamb", learning_rate=0.1), updates=1)
    before, after = alpha(history[0]), alpha(history[1])
    np.testing.assert_allclose(np.abs(after - before), 0.1 * np.abs(before), rtol=1e-4)


@pytest.mark.guarantee("optimizer groups")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_alpha_alone_is_not_decayed_and_a_rate_of_zero_freezes_it_to_the_bit(name):
    """The control of a deep network: gates frozen where they start, with decay or without."""
    config = settings(name=name, learning_rate=0.1, weight_decay=0.5)
    params = random_tree()
    optimizer, _ = make_optimizer(config, 1, MODEL)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_array_equal(alpha(changes), 0.0)
    assert np.abs(kernel(changes)).min() > 0.0

    config.warmup_steps = 2
    config.alpha.update({"learning_rate": 0.0, "weight_decay": 0.5})
    values = np.float32([0.0, 1.0, -0.5, 1e-30, 3.0])
    params["trunk"]["blocks"]["rule"]["alpha"] = jnp.asarray(values)
    history, *_ = run(config, updates=3, params=params)
    frozen = history[-1]["trunk"]["blocks"]["rule"]["alpha"]
    assert np.asarray(frozen).tobytes() == values.tobytes()
    assert (kernel(history[-1]) != kernel(history[0])).all()


@pytest.mark.guarantee("optimizer groups")
def test_alpha_has_its_own_rate_optimizer_and_schedule():
    config = settings(name="sgd", learning_rate=0.1, momentum=0.0, schedule="linear")
    config.alpha.update({"name": "adagrad", "learning_rate": 0.25, "schedule": "constant"})
    history, grads, schedules = run(config, updates=1, total=10)
    np.testing.assert_allclose(
        alpha(history[1]), alpha(history[0]) - 0.25 * np.sign(alpha(grads[0])), rtol=1e-5
    )
    np.testing.assert_allclose(
        kernel(history[1]), kernel(history[0]) - 0.1 * kernel(grads[0]), rtol=1e-4, atol=1e-6
    )
    assert schedules["alpha"](5) == 0.25
    np.testing.assert_allclose(schedules["base"](5), 0.05, rtol=1e-6)


def test_gates_are_found_by_type_whatever_they_are_called():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.switch = Alpha(jnp.zeros(()))
            self.alpha = nnx.Param(jnp.zeros(()))
            self.wrapped = ReZero(nnx.Linear(2, 2, rngs=rngs))

    gates = [path for path, info in model_spec(Layer).parameters.items() if info.is_gate]
    assert sorted(gates) == ["switch", "wrapped/alpha"]


@pytest.mark.guarantee("optimizer groups")
def test_groups_by_path():
    config = settings(name="sgd", learning_rate=0.1, momentum=0.0)
    config.groups.bias = optim_group(path="bias$", learning_rate=0.01)
    history, grads, schedules = run(config, updates=1)
    for name, rate in (("bias", 0.01), ("kernel", 0.1)):
        change = np.asarray(history[1]["head"][name]) - np.asarray(history[0]["head"][name])
        np.testing.assert_allclose(change, -rate * grads[0]["head"][name], rtol=1e-3, atol=1e-6)
    assert set(schedules) == {"alpha", "base", "bias"}


def test_a_path_that_matches_nothing_and_one_matched_twice_are_errors():
    config = settings()
    config.groups.a = optim_group(path="nothing")
    with pytest.raises(UserError, match="matches no parameter"):
        make_optimizer(config, 1, MODEL)
    config = settings()
    config.groups.a = optim_group(path="(")
    with pytest.raises(UserError, match="is not a regular expression"):
        make_optimizer(config, 1, MODEL)
    config.groups.a = optim_group(path="bias")
    config.groups.b = optim_group(path="head")
    with pytest.raises(UserError, match="head/bias belongs to the optimizer groups a and b"):
        make_optimizer(config, 1, MODEL)


def test_schedules():
    points = ((0.0, 0.1), (0.2, 1.0), (0.7, 0.5), (1.0, 0.0))
    cases = [
        ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"schedule": "multistep"}, {0: 1.0, 49: 1.0, 50: 0.1, 74: 0.1, 75: 0.01}),
        (
            {"schedule": "piecewise", "points": points},
            {0: 0.1, 10: 0.55, 20: 1.0, 45: 0.75, 70: 0.5, 85: 0.25, 100: 0.0},
        ),
        (
            {"schedule": "piecewise", "points": ((0.0, 1.0), (0.5, 0.5)), "warmup_steps": 10},
            {0: 0.1, 9: 1.0, 10: 0.9, 50: 0.5, 100: 0.5},
        ),
        ({"schedule": "constant", "warmup_steps": 10}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0}),
        ({"schedule": "linear", "warmup_steps": 10}, {0: 0.1, 10: 1.0, 55: 0.5, 100: 0.0}),
        ({"schedule": "multistep", "warmup_steps": 10}, {9: 1.0, 49: 1.0, 50: 0.1, 75: 0.01}),
    ]
    for fields, rates in cases:
        schedule = make_schedule(settings(learning_rate=1.0, **fields), 100)
        for step, rate in rates.items():
            np.testing.assert_allclose(schedule(step), rate, atol=1e-6, err_msg=f"{fields} {step}")
    for points in (
        (),
        (0.5,),
        ((0.5, 1.0), (0.0, 0.0)),
        ((0.0, 1.0), (2.0, 0.0)),
        ((-0.1, 1.0), (1.0, 0.0)),
    ):
        with pytest.raises(UserError, match=r"optim\.points"):
            make_schedule(settings(schedule="piecewise", points=points), 100)


def test_clipping_is_by_the_global_norm_over_all_groups():
    config = settings(name="sgd", learning_rate=0.1, momentum=0.0, clip_norm=0.5)
    history, grads, _ = run(config, updates=1)
    change = jax.tree.map(jnp.subtract, history[1], history[0])
    np.testing.assert_allclose(optax.tree.norm(change), 0.1 * 0.5, rtol=1e-4)
    scale = 0.1 * 0.5 / optax.tree.norm(grads[0])
    np.testing.assert_allclose(alpha(change), -scale * alpha(grads[0]), rtol=1e-3, atol=1e-6)


def test_momentum_follows_its_points():
    points = ((0.0, 0.9), (0.5, 0.5), (1.0, 0.7))
    config = settings(name="sgd", learning_rate=0.1, weight_decay=0.01, momentum_points=points)
    history, grads, _ = run(config, updates=8, total=8)
    p, v = kernel(history[0]), 0.0
    for step, g in enumerate(map(kernel, grads)):
        v = np.interp(step / 8, *zip(*points, strict=True)) * v + g + 0.01 * p
        p = p - 0.1 * v
    np.testing.assert_allclose(kernel(history[-1]), p, rtol=1e-4, atol=1e-5)


# ---- Muon: the orthogonalised momentum in NumPy, matrix by matrix; AdamW for the rest

MODELS = {
    "mlp": partial(MLP, 4, 6, 7, 2),  # deeper than wide
    "unrolled": partial(MLP, 4, 6, 3, 2, scan=False),
    "transformer": partial(Transformer, 11, 8, 3, 4, 6, positions="learned", kv_heads=2),
    "vit": partial(ViT, 4, 2, 8, 3, 2, 5, feedforward=12),
    "cifar": partial(ResNet.cifar, 14, width=2),
}
MUON = {"name": "muon", "learning_rate": 0.01, "weight_decay": 0.1}


def parameters_after(spec, config, params, gradients):
    """The parameters, path -> array, after updates by these gradients."""
    optimizer, _ = make_optimizer(config, 10, spec)

    @jax.jit
    def update(params, state, gradient):
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = update(params, state, gradient)
    return flat(params)


def orthogonal(matrix):
    """Five of Muon's Newton-Schulz steps; singular values end near 1."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(params, gradients):
    """A matrix after updates by these gradients: Nesterov momentum 0.95, bias corrected."""
    momentum = 0.0
    for t, gradient in enumerate(gradients, 1):
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * gradient / (1 - 0.95**t)
        step = 0.2 * np.sqrt(max(params.shape)) * orthogonal(ahead)
        params = params - 0.01 * (step + 0.1 * params)
    return params


def matrices(name, leaf):
    """The views of a stacked or single parameter that Muon takes for matrices."""
    if name.endswith("qkv"):  # (..., width, kv_heads, queries + 2, size)
        for layer in leaf.reshape(-1, *leaf.shape[-4:]):
            for slot in range(leaf.shape[-2]):
                yield layer[:, :, slot].reshape(leaf.shape[-4], -1)
    elif leaf.shape[-4:-2] in ((3, 3), (1, 1)):  # (..., rows, columns, in, out)
        yield from leaf.reshape(-1, 9 * leaf.shape[-2], leaf.shape[-1])
    else:
        yield from leaf.reshape(-1, *leaf.shape[-2:])


@pytest.mark.parametrize("family", ["mlp", "unrolled", "transformer", *map(slow, ("vit", "cifar"))])
def test_muon_moves_each_matrix_of_each_layer_by_its_equations_and_the_rest_by_adamw(family):
    spec = model_spec(lambda rngs: MODELS[family](rngs=rngs))
    before, gradients = random_tree(spec.shapes), [random_tree(spec.shapes) for _ in range(2)]
    after = parameters_after(spec, settings(**MUON), before, gradients)
    adamw = parameters_after(spec, settings(**MUON | {"name": "adamw"}), before, gradients)
    before, gradients = flat(before), [flat(gradient) for gradient in gradients]
    hidden = [
        name
        for name in before
        if name.startswith(("trunk/", "stages/")) and name.endswith(("kernel", "/qkv"))
    ]
    assert {p for p, info in spec.parameters.items() if info.matrix_axes} == set(hidden)
    for name, value in after.items():
        if name not in hidden:
            np.testing.assert_array_equal(value, adamw[name], err_msg=name)
            continue
        views = zip(
            matrices(name, before[name]),
            zip(*(matrices(name, gradient[name]) for gradient in gradients), strict=True),
            matrices(name, value),
            strict=True,
        )
        for start, steps, end in views:
            expected = muon(np.float64(start), np.float64(steps))
            np.testing.assert_allclose(end, expected, rtol=1e-4, atol=1e-5, err_msg=name)
