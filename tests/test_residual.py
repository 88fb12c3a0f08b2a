"""The rules against their equations, and the contracts of the gate."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax import Alpha, ReZero
from rezero_jax.errors import UserError
from rezero_jax.residual import RULES, Place, RuleConfig, make_rule
from rezero_jax.residual.streams import sinkhorn

X = jax.random.normal(jax.random.key(0), (5, 8))
WEIGHT = jax.random.normal(jax.random.key(1), (8, 8)) / np.sqrt(8)


def branch(x):
    return nnx.relu(x @ WEIGHT)


def layer_norm(x):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def numpy_branch(x):
    return np.maximum(np.asarray(x, np.float64) @ np.asarray(WEIGHT, np.float64), 0.0)


def orthogonal_to(x, f):
    return f - (x * f).sum(-1, keepdims=True) / ((x**2).sum(-1, keepdims=True) + 1e-6) * x


def maxtext_mhc(streams, numbers):
    """maxtext's layers/mhc.py in float64: its matrix of residuals is used transposed."""
    scale, bias, weights = numbers
    x, n = np.asarray(streams, np.float64), streams.shape[-2]
    flat = x.reshape(len(x), -1)
    h = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-5) @ weights
    pre, post, res = np.split(h, (n, 2 * n), axis=-1)
    pre = 1 / (1 + np.exp(-(scale[0] * pre + bias[:n])))
    post = 2 / (1 + np.exp(-(scale[1] * post + bias[n : 2 * n])))
    res = (scale[2] * res + bias[2 * n :]).reshape(-1, n, n).swapaxes(1, 2)
    res = np.exp(res) / np.exp(res).sum(-1, keepdims=True) + 1e-6
    res = res / (res.sum(-2, keepdims=True) + 1e-6)
    for _ in range(20):
        res = res / res.sum(-1, keepdims=True)
        res = res / res.sum(-2, keepdims=True)
    fx = numpy_branch(layer_norm(np.einsum("skd,sk->sd", x, pre)))
    return np.einsum("skd,skm->smd", x, res) + np.einsum("sd,sk->skd", fx, post)


@cache
def mhc_numbers():
    rule = made("mhc")
    numbers = (rule.mix_scale, rule.mix_bias, rule.mix_weights)
    return [np.asarray(number[...], np.float64) for number in numbers]


def mhc_at_the_start(x, a):
    streams = np.repeat(np.asarray(x)[:, None], 4, axis=1)
    return maxtext_mhc(streams, mhc_numbers()).sum(axis=1)


PLACE = Place(layer=3, layers=8, sublayer=0, sublayers=2)
MIXED = 1.35 - 0.25 * 2 / 7  # lambda + mu of x0_scalars in layer 3 of 8
EQUATIONS = {  # in layer 3 of 8 layers of two branches, that is 16 branches
    "plain": lambda x, a: numpy_branch(x),
    "residual": lambda x, a: x + numpy_branch(x),
    "norm": lambda x, a: layer_norm(numpy_branch(x)),
    "pre_norm": lambda x, a: x + numpy_branch(layer_norm(x)),
    "post_norm": lambda x, a: layer_norm(x + numpy_branch(x)),
    "gpt2_norm": lambda x, a: x + layer_norm(numpy_branch(x)),
    "rezero": lambda x, a: x + a * numpy_branch(x),
    "gated": lambda x, a: (1 - a) * x + a * numpy_branch(x),
    "rezero_channel": lambda x, a: x + a * numpy_branch(x),
    "rezero_norm": lambda x, a: x + a * numpy_branch(layer_norm(x)),
    "layerscale": lambda x, a: x + a * numpy_branch(layer_norm(x)),
    "peri_norm": lambda x, a: x + layer_norm(numpy_branch(layer_norm(x))),
    "layernorm_scaling": lambda x, a: x + numpy_branch(layer_norm(x) / np.sqrt(3)),
    "deep_norm": lambda x, a: layer_norm(2 * x + numpy_branch(x)),
    "sub_norm": lambda x, a: x + numpy_branch(layer_norm(x)),
    "completep": lambda x, a: x + numpy_branch(layer_norm(x)) / 4,
    "depth_mup": lambda x, a: x + numpy_branch(layer_norm(x)) / 2,
    "orthogonal": lambda x, a: x + orthogonal_to(x, numpy_branch(layer_norm(x))),
    "hyper_connections": lambda x, a: 4 * (x + numpy_branch(layer_norm(x))),  # at the start
    "mhc": mhc_at_the_start,
    "x0_scalars": lambda x, a: MIXED * x + numpy_branch(layer_norm(MIXED * x)),
}


def made(name, **options):
    return make_rule(RuleConfig(name, **options), 8, place=PLACE, rngs=nnx.Rngs(0))


def call(rule, x, f):
    """The rule between the ends of a network, where it has several streams."""
    return rule.leave(rule(rule.enter(x), f))


def test_every_rule_is_its_equation_with_its_gradient_and_keeps_the_trunks_dtype():
    """The gradient in a random direction, by central differences of the float64 equation."""
    assert set(RULES) == set(EQUATIONS)
    x = np.asarray(X, np.float64)
    direction = np.asarray(jax.random.normal(jax.random.key(5), X.shape))
    for name in RULES:
        rule, equation = made(name, alpha_init=0.3), partial(EQUATIONS[name], a=0.3)
        function = partial(jax.jvp, partial(call, rule, f=branch))
        found, slope = jax.jit(function)((X,), (direction,))
        np.testing.assert_allclose(found, equation(x), rtol=1e-5, atol=1e-6, err_msg=name)
        difference = equation(x + 1e-6 * direction) - equation(x - 1e-6 * direction)
        np.testing.assert_allclose(slope, difference / 2e-6, rtol=1e-4, atol=1e-4, err_msg=name)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rule)), name
        for dtype, other in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
            cast = partial(jax.lax.convert_element_type, new_dtype=other)
            out = jax.eval_shape(partial(call, rule, f=cast), X.astype(dtype))
            assert out.dtype == dtype, name


def test_options_of_a_rule_are_checked_once_and_by_name():
    for options, text in (
        ({"residual": "prenorm"}, 'residual rule.*"pre_norm"'),
        ({"norm": "dit"}, 'norm.*"dyt"'),
        ({"base_depth": 0}, "base_depth"),
    ):
        with pytest.raises(UserError, match=text):
            RuleConfig(**options)
    with pytest.raises(UserError, match="residual rule"):
        make_rule("prenorm", 8, rngs=nnx.Rngs(0))
    for name in ("layerscale", "layernorm_scaling", "deep_norm", "completep", "depth_mup"):
        with pytest.raises(UserError, match=r"place=residual\.Place\(layer, layers\)"):
            make_rule(name, 8, rngs=nnx.Rngs(0))


def test_layerscale_starts_by_depth_as_in_cait():
    for layers, start in ((1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)):
        rule = make_rule("layerscale", 8, place=Place(1, layers), rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(rule.alpha[...], np.full(8, start, np.float32))


def test_hyper_connections_mix_streams_by_what_they_hold():
    """Algorithm 2 of the paper in NumPy, with every parameter drawn."""
    rule = made("hyper_connections")
    np.testing.assert_array_equal(rule.mix[...], np.eye(4, 5, 1) + np.eye(4)[:, [0]] * np.eye(5)[0])
    generator = np.random.default_rng(0)
    drawn = {}
    for name in ("mix", "spread", "mix_scale", "spread_scale", "mix_weights", "spread_weights"):
        parameter = getattr(rule, name)
        drawn[name] = generator.normal(size=parameter.shape)
        parameter[...] = jnp.asarray(drawn[name], jnp.float32)
    x = generator.normal(size=(5, 4, 8))
    h = layer_norm(x)
    alpha = drawn["mix"] + drawn["mix_scale"] * np.tanh(h @ drawn["mix_weights"])
    beta = drawn["spread"] + drawn["spread_scale"] * np.tanh(h @ drawn["spread_weights"])[..., 0]
    mixed = np.stack([a.T @ one for a, one in zip(alpha, x, strict=True)])
    branch_of = numpy_branch(layer_norm(mixed[:, 0]))
    expected = mixed[:, 1:] + beta[:, :, None] * branch_of[:, None]
    found = jax.jit(lambda x: rule(x, branch))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def drawn_mhc(seed):
    rule, generator = made("mhc"), np.random.default_rng(seed)
    numbers = [
        generator.normal(size=3),
        generator.normal(size=24),
        0.2 * generator.normal(size=(32, 24)),
    ]
    for parameter, number in zip(
        (rule.mix_scale, rule.mix_bias, rule.mix_weights), numbers, strict=True
    ):
        parameter[...] = jnp.asarray(number, jnp.float32)
    return rule, numbers, generator.normal(size=(5, 4, 8))


def test_mhc_is_that_of_maxtext():
    """With every parameter drawn."""
    rule, numbers, x = drawn_mhc(0)
    found = jax.jit(lambda x: rule(x, branch))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, maxtext_mhc(x, numbers), rtol=1e-4, atol=1e-4)


def test_the_streams_of_mhc_are_mixed_by_a_doubly_stochastic_matrix():
    rule, _, x = drawn_mhc(2)
    pre, post, res = jax.jit(rule.maps)(jnp.asarray(x, jnp.float32))
    assert res.min() > 0
    assert res.std() > 0.1
    np.testing.assert_allclose(res.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(res.sum(-2), 1, rtol=1e-3)
    for weights, most in ((pre, 1), (post, 2)):
        assert 0 < weights.min() < weights.max() < most
    huge = jax.jit(sinkhorn)(jnp.diag(jnp.asarray([1e3, 0.0, -1e3])))
    np.testing.assert_allclose(huge.sum(-1), 1, rtol=1e-6)


def test_dyt_in_place_of_the_norm():
    rule = made("peri_norm", norm="dyt")
    for norm, (a, scale, bias) in ((rule.norm, (0.7, 2.0, 0.1)), (rule.norm_out, (0.3, 0.5, -1.0))):
        np.testing.assert_array_equal(norm.a[...], 0.5)
        norm.a[...], norm.scale[...], norm.bias[...] = (
            jnp.asarray(a),
            jnp.full(8, scale),
            jnp.full(8, bias),
        )
    x = np.asarray(X, np.float64)
    inner = numpy_branch(2 * np.tanh(0.7 * x) + 0.1)
    expected = x + 0.5 * np.tanh(0.3 * inner) - 1
    np.testing.assert_allclose(rule(X, branch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rezero_channel", "layerscale"])
def test_a_gate_per_channel_gates_each_channel_by_itself(name):
    rule = made(name)
    gains = jnp.arange(8.0)
    rule.alpha[...] = gains
    u = layer_norm(X) if name == "layerscale" else X
    expected = np.asarray(X) + np.arange(8.0) * numpy_branch(u)
    np.testing.assert_allclose(rule(X, branch), expected, rtol=1e-5, atol=1e-6)


def test_alpha_is_the_only_gate_and_a_scalar_that_starts_at_zero():
    shapes = {"rezero": (), "gated": (), "rezero_norm": (), "rezero_channel": (8,)}
    for name in RULES:
        rule = make_rule(name, 8, place=PLACE, rngs=nnx.Rngs(0))
        gates = [gate for _, gate in nnx.iter_graph(rule) if isinstance(gate, Alpha)]
        if name == "layerscale":
            assert [gate.shape for gate in gates] == [(8,)]
        else:
            assert [gate.shape for gate in gates] == ([shapes[name]] if name in shapes else [])
        if name in shapes:
            np.testing.assert_array_equal(rule.alpha[...], 0)
            assert rule.alpha.dtype == jnp.float32
            np.testing.assert_array_equal(rule(X, branch), X)
    assert ReZero(branch).alpha.shape == ()
    assert ReZero(branch)(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rezero_wraps_functions_and_modules_with_further_arguments():
    np.testing.assert_allclose(ReZero(branch, 0.5)(X), X + 0.5 * branch(X), rtol=1e-6)
    linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ReZero(linear, -2.0)(X), X - 2.0 * linear(X), rtol=1e-5, atol=1e-6)
    shifted = ReZero(lambda x, shift, *, scale: scale * (x + shift), 0.1)
    np.testing.assert_allclose(shifted(X, 1.0, scale=3.0), X + 0.3 * (X + 1), rtol=1e-5)
    assert isinstance(shifted.alpha, Alpha)


def test_an_integer_trunk_is_an_error():
    for name in RULES:
        with pytest.raises(UserError, match="the trunk is int32"):
            jax.eval_shape(partial(call, made(name), f=jnp.tanh), jnp.ones((5, 8), jnp.int32))
    with pytest.raises(UserError, match="the trunk is uint8"):
        ReZero(lambda x: 2.0 * x)(jnp.ones((2, 8), jnp.uint8))


def test_a_branch_of_another_shape_is_an_error():
    for name in RULES:
        with pytest.raises(ValueError, match=r"map \(5, 8\) to \(5, 1\)"):
            jax.eval_shape(partial(call, made(name), f=lambda u: u[:, :1]), X)
