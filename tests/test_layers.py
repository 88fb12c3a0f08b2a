"""Transformer layers: parity with PyTorch, masks, heads, dropout, precision."""

import inspect
import math
from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax.errors import UserError
from rezero_jax.models.dropout import LEVELS
from rezero_jax.models.transformer.attention import Attention, attend, rotate
from rezero_jax.models.transformer.config import ACTIVATIONS, TransformerConfig
from rezero_jax.models.transformer.layer import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
)
from rezero_jax.models.weights import from_torch, to_torch
from rezero_jax.residual import RuleConfig
from tests.families import drawn, stored, under

SIZES = (16, 4, 32)  # width, heads, feed-forward of the references
MAKE = {
    "encoder": partial(EncoderLayer, *SIZES),
    "encoder_gelu": partial(EncoderLayer, *SIZES, activation="gelu"),
    "encoder_causal": partial(EncoderLayer, *SIZES),
    "encoder_padded": partial(EncoderLayer, *SIZES),
    "encoder_12": partial(Encoder, 16, 12, 4, feedforward=32),
    "encoder_12_unrolled": partial(Encoder, 16, 12, 4, feedforward=32, scan=False),
    "decoder": partial(DecoderLayer, *SIZES),
    "decoder_plain": partial(DecoderLayer, *SIZES),
    "post_norm": partial(EncoderLayer, *SIZES, residual="post_norm"),
    "pre_norm": partial(EncoderLayer, *SIZES, residual="pre_norm"),
    "post_norm_decoder": partial(DecoderLayer, *SIZES, residual="post_norm"),
    "pre_norm_decoder": partial(DecoderLayer, *SIZES, residual="pre_norm"),
}
NOT_CAUSAL = ("encoder", "encoder_gelu", "decoder_plain", "pre_norm_decoder")
FAST = [("encoder_padded", False)]
FAST += [(case, True) for case in ("encoder_12", "decoder", "pre_norm", "post_norm_decoder")]
SLOW = [("decoder", False), ("encoder_causal", False)]
SLOW += [(case, case not in NOT_CAUSAL) for case in MAKE if (case, True) not in FAST]

# These programs are small and run once or twice: optimising them would take longest.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape, dtype=jnp.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def some_mask(seed, *shape):
    """A random mask in which no query sees nothing."""
    mask = np.random.default_rng(seed).random(shape) < 0.5
    return mask | np.eye(*shape[-2:], dtype=bool)


def lengths(longest, *each):
    """A key mask of sequences of these lengths."""
    return np.arange(longest) < np.array(each)[:, None]


X, MEMORY = jnp.asarray(normal(0, 3, 7, 16)), jnp.asarray(normal(1, 3, 5, 16))
CAUSAL = np.tri(7, dtype=bool)


def rngs(seed):
    """Random bits of a kind that compiles fast."""
    return nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg"))


def new(layer, *args, **options):
    """A module with random parameters, biases and norms too."""
    return drawn(partial(layer, *args, **options), alpha=0.5)


@partial(jit, static_argnames="is_causal")
def call(module, *args, seed=None, **options):
    """The module's output; with dropout where there is a seed."""
    return module(*args, **options, **({} if seed is None else {"rngs": rngs(seed)}))


@partial(jit, static_argnames="is_causal")
def run(module, inputs, masks, cotangent, is_causal):
    """The output, and the gradients of sum(out * cotangent) of parameters and inputs."""

    def loss(module, inputs):
        out = module(*inputs, **masks, is_causal=is_causal)
        return jnp.sum(out * cotangent), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(module, inputs)
    return out, *grads


def assert_close(actual, expected, name="", relative=1e-5):
    """Within 1e-5 of the tensor's largest entry.

    Rounding in float32 is relative to what is summed, not to the sum, which may be small. (The
    keys' biases change no softmax: their gradient is zero but for it.)
    """
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    bound = relative * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=name)


@pytest.mark.guarantee("PyTorch parity")
@pytest.mark.parametrize(
    ("case", "is_causal"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_same_outputs_and_gradients_as_pytorch(case, is_causal):
    """The causal ones by is_causal, and some by a mask as PyTorch has it."""
    module = nnx.eval_shape(lambda: MAKE[case](rngs=nnx.Rngs(0)))
    prefix = f"{case.removesuffix('_unrolled')}/"
    arrays = under(prefix, stored("transformer"))
    state = {k: v for k, v in arrays.items() if k.startswith("state/")}
    from_torch(module, state, prefix="state/")
    inputs = [arrays[name] for name in ("x", "memory") if name in arrays]
    masks = {
        ours: ~arrays[theirs]
        for ours, theirs in (
            ("mask", "mask"),
            ("key_mask", "key_padding_mask"),
            ("memory_key_mask", "memory_key_padding_mask"),
        )
        if theirs in arrays and not (is_causal and theirs == "mask")
    }
    assert is_causal or ("mask" in masks) == (case not in NOT_CAUSAL)

    out, grads, input_grads = run(module, inputs, masks, arrays["cotangent"], is_causal)
    assert_close(out, arrays["out"], "out")
    ours = to_torch(grads, prefix="grad/")
    assert ours.keys() == {name for name in arrays if name.startswith("grad/")}
    ours |= dict(zip(("grad_x", "grad_memory"), input_grads, strict=False))
    for name, grad in ours.items():
        assert_close(grad, arrays[name], name)


def test_gates_of_sublayers_share_out_the_gradient_of_the_layers_gate():
    shared, each = (
        run(new(DecoderLayer, *SIZES, alpha_per=per), [X, MEMORY], {}, X, False)[1].rules
        for per in ("layer", "sublayer")
    )
    (one,), three = ([rule.alpha[...] for rule in rules] for rules in (shared, each))
    assert len({float(gradient) for gradient in three}) == 3
    np.testing.assert_allclose(one, sum(three), rtol=1e-5)


def assert_uniform(values, bound):
    values = np.asarray(values)
    assert (1 - 20 / values.size) * bound < np.abs(values).max() <= bound
    np.testing.assert_allclose(values.var(), bound**2 / 3, rtol=0.15)
    assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)


def test_initial_distributions():
    width, hidden = 48, 1200

    @jit
    def make():
        stack = Decoder(width, 4, 4, feedforward=hidden, final_norm=True, rngs=nnx.Rngs(0))
        config = TransformerConfig(kv_heads=2)
        return stack, [Attention(width, 8, config, rngs=nnx.Rngs(seed)) for seed in (0, 1)]

    stack, (grouped, other) = make()
    for _, param in nnx.to_flat_state(nnx.state((stack, grouped, other))):
        param.set_value(np.asarray(param[...]))
    layer = stack.layers.blocks
    for attention in (layer.attention, layer.cross_attention):
        assert attention.qkv.shape == (4, width, 4, 3, 12)
        for part in range(3):  # queries, keys and values count as one matrix
            assert_uniform(attention.qkv[...][:, :, :, part], np.sqrt(6 / (4 * width)))
        assert_uniform(attention.out.kernel[...], np.sqrt(6 / (2 * width)))
        np.testing.assert_array_equal(attention.qkv_bias[...], 0)
        np.testing.assert_array_equal(attention.out.bias[...], 0)
    for linear, fan_in in ((layer.feedforward.up, width), (layer.feedforward.down, hidden)):
        assert_uniform(linear.kernel[...], np.sqrt(6 / (width + hidden)))
        assert_uniform(linear.bias[...], 1 / np.sqrt(fan_in))
    np.testing.assert_array_equal(layer.rules[0].alpha[...], np.zeros(4))
    np.testing.assert_array_equal(stack.norm.scale[...], 1)
    np.testing.assert_array_equal(stack.norm.bias[...], 0)
    assert not np.array_equal(layer.attention.qkv[0], layer.attention.qkv[1])
    assert not np.array_equal(layer.attention.qkv[...], layer.cross_attention.qkv[...])

    assert_uniform(grouped.qkv[...], np.sqrt(6 / (2 * width + 2 * 2 * 6)))
    assert not np.array_equal(grouped.qkv[...], other.qkv[...])


def test_activations():
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    expected = {
        "relu": np.maximum(x, 0),
        "gelu": 0.5 * x * (1 + np.asarray([math.erf(value / math.sqrt(2)) for value in x])),
        "gelu_tanh": 0.5 * x * (1 + tanh),
        "silu": x / (1 + np.exp(-x)),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        layer = new(FeedForward, 1, TransformerConfig(feedforward=1, activation=name, bias=False))
        layer.up.kernel[...] = layer.down.kernel[...] = jnp.ones((1, 1))
        np.testing.assert_allclose(
            call(layer, x[None, :, None])[0, :, 0], values, rtol=1e-5, atol=1e-6
        )


def test_masks_of_two_three_and_four_axes_agree():
    layer = new(DecoderLayer, 16, 4)
    to_memory = some_mask(2, 7, 5) | (np.arange(5) == 0)
    expected = call(layer, X, MEMORY, CAUSAL, to_memory)
    assert not np.allclose(expected, call(layer, X, MEMORY), atol=1e-3)
    for axes in ((3,), (3, 4)):
        masks = [np.broadcast_to(mask, (*axes, *mask.shape)) for mask in (CAUSAL, to_memory)]
        assert_close(call(layer, X, MEMORY, *masks), expected)
    assert_close(call(layer, X, MEMORY, memory_mask=to_memory, is_causal=True), expected)
    # Both: what either forbids is not seen.
    encoder, apart = new(EncoderLayer, 16, 4), some_mask(3, 7, 7) & CAUSAL
    assert_close(
        call(encoder, X, apart | ~CAUSAL, is_causal=True), call(encoder, X, apart[None, None])
    )


def test_every_sequence_and_head_has_a_mask_of_its_own():
    mask = some_mask(2, 3, 4, 7, 7)
    q, k, v = (normal(seed, 3, 7, 4, 8) for seed in range(3))
    whole, alone = jit(attend)(q, k, v, mask=mask), jit(attend)
    for i, h in np.ndindex(3, 4):
        one = np.s_[i : i + 1, :, h : h + 1]
        assert_close(alone(q[one], k[one], v[one], mask=mask[i : i + 1, h : h + 1]), whole[one])


def test_padding_is_not_seen():
    layer = new(DecoderLayer, 16, 4)
    seen, seen_memory = lengths(7, 7, 4, 2), lengths(5, 3, 5, 1)
    masks = {"key_mask": seen, "memory_key_mask": seen_memory}
    out = call(layer, X, MEMORY, **masks)
    x, memory = np.where(seen[..., None], X, 9), np.where(seen_memory[..., None], MEMORY, 9)
    assert_close(np.asarray(call(layer, x, memory, **masks))[seen], np.asarray(out)[seen])
    assert_close(call(layer, X[1:2, :4], MEMORY[1:2])[0], out[1, :4])


def test_padding_on_either_side_changes_no_other_position():
    """Rotary positions count what the mask shows, also around a gap."""
    stack = new(Decoder, 16, 2, 4, rotary=True)
    expected = call(stack, X[:1], MEMORY[:1], is_causal=True)[0]
    seen = np.zeros((3, 12), bool)
    seen[0, 5:] = seen[1, :7] = seen[2, [0, 1, 4, 5, 6, 10, 11]] = True
    x = np.full((3, 12, 16), 9, np.float32)
    x[seen] = np.tile(X[0], (3, 1))
    memory = jnp.tile(MEMORY[:1], (3, 1, 1))
    out = np.asarray(call(stack, x, memory, key_mask=seen, is_causal=True))[seen]
    for row in out.reshape(3, 7, 16):
        assert_close(row, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_query_that_sees_no_key_gets_nothing_from_attention(dropout):
    layer = new(Attention, 16, 4, TransformerConfig(dropout=dropout))
    masks = {"mask": jnp.asarray(CAUSAL), "key_mask": jnp.asarray(lengths(7, 7, 0, 4)[:, ::-1])}
    out = np.asarray(call(layer, X, **masks, seed=0))
    blind = ~(np.asarray(masks["key_mask"])[:, None] & CAUSAL).any(axis=-1)
    assert blind.sum() == 7 + 3
    np.testing.assert_array_equal(out[blind], np.tile(layer.out.bias[...], (10, 1)))
    assert not np.isclose(out[~blind], layer.out.bias[...]).all(axis=-1).any()
    grads = jit(jax.grad(lambda x: layer(x, **masks, rngs=rngs(0)).sum()))(X)
    assert np.isfinite(grads).all()


def test_stochastic_depth_drops_branches_of_examples_more_often_in_later_layers():
    """Branches of 1 and of 0 in each of 3 layers, which stay with probability 1, 3/4 and 1/2."""
    stack = new(Encoder, 16, 3, 4, stochastic_depth=0.5, residual="residual")
    block = stack.layers.blocks
    for _, param in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        param.set_value(jnp.zeros(param.shape))
    block.feedforward.down.bias.set_value(jnp.ones((3, 16)))
    block.stochastic_depth.rate.set_value(jnp.array([0, 0.25, 0.5]))
    x = jnp.zeros((2000, 2, 16))
    added = np.asarray(call(stack, x, seed=0))
    np.testing.assert_array_equal(added, np.tile(added[:, :1, :1], (1, 2, 16)))
    values, counts = np.unique(np.round(added[:, 0, 0], 4), return_counts=True)
    np.testing.assert_allclose(values, [1, 1 + 4 / 3, 3, 3 + 4 / 3], rtol=1e-4)
    np.testing.assert_allclose(counts / 2000, [1 / 8, 3 / 8, 1 / 8, 3 / 8], atol=0.04)
    stack.eval()
    np.testing.assert_array_equal(call(stack, x, seed=0), 3)


def test_stochastic_depth_of_a_layer_follows_its_place():
    stack = jit(lambda: Encoder(8, 3, 2, stochastic_depth=0.5, rngs=nnx.Rngs(0)).layers.blocks)()
    np.testing.assert_array_equal(stack.stochastic_depth.rate[...], [0, 0.25, 0.5])
    alone = jit(lambda: EncoderLayer(8, 2, stochastic_depth=0.5, rngs=nnx.Rngs(0)))()
    assert alone.stochastic_depth.rate[...] == 0.5


def full_heads(grouped, heads):
    """The projections of as many heads of keys and values, each repeated."""
    shared = grouped.shape[-2] - 2
    queries = grouped[..., :shared, :].reshape(*grouped.shape[:-3], heads, 1, -1)
    rest = jnp.repeat(grouped[..., shared:, :], shared, axis=-3)
    return jnp.concatenate([queries, rest], axis=-2)


@pytest.mark.parametrize(("kv_heads", "how"), [(1, "memory"), (2, "dropout"), (2, "rotary")])
def test_shared_key_heads_equal_repeated_ones(how, kv_heads):
    options = {"dropout": 0.5 * (how == "dropout"), "rotary": how == "rotary"}
    grouped = new(Attention, 16, 4, TransformerConfig(kv_heads=kv_heads, **options))
    full = new(Attention, 16, 4, TransformerConfig(**options))
    nnx.update(full.out, nnx.state(grouped.out))
    full.qkv[...], full.qkv_bias[...] = (
        full_heads(param[...], 4) for param in (grouped.qkv, grouped.qkv_bias)
    )
    memory = MEMORY if how == "memory" else None
    masks = {"mask": some_mask(3, 3, 4, 7, 7)} if how == "dropout" else {}
    out, expected = (
        call(attention, X, memory, **masks, is_causal=how == "dropout", seed=4)
        for attention in (grouped, full)
    )
    assert_close(out, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_materialised_weights_give_the_same(is_causal):
    """The path that dropout takes, with a dropout that does nothing."""
    q, k, v = (jnp.asarray(normal(seed, 3, 7, n, 8)) for seed, n in enumerate((4, 2, 2)))
    whole = jnp.asarray(some_mask(3, 3, 4, 7, 7))
    for mask in (None, whole, whole[:1, :1]):
        out, expected = jit(
            lambda mask: [
                attend(q, k, v, mask=mask, is_causal=is_causal, drop=drop)
                for drop in (None, lambda weights: weights)
            ]
        )(mask)
        assert_close(out, expected)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("length", "dtype", "blocks"),
    [
        (65, jnp.float32, 2),
        (100, jnp.bfloat16, 2),
        (200, jnp.float32, 4),
        pytest.param(600, jnp.float32, 8, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_causal_attention_equal_the_whole(length, dtype, blocks):
    q, k, v, g = (
        normal(seed, 1, length, heads, 8, dtype=dtype) for seed, heads in enumerate((2, 1, 1, 2))
    )

    def blocked(q, k, v):
        return attend(q, k, v, is_causal=True)

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    assert str(jax.make_jaxpr(blocked)(q, k, v)).count(" exp ") == blocks

    @jit
    def with_gradients(q, k, v, g):
        results = [jax.vjp(f, q, k, v) for f in (blocked, whole)]
        return [(out, *pullback(g)) for out, pullback in results]

    for a, b in zip(*with_gradients(q, k, v, g), strict=True):
        assert a.dtype == dtype
        # bfloat16 keeps 8 bits, rounded a few times.
        assert_close(a, b, relative=1e-5 if dtype == jnp.float32 else 2.0**-6)


def test_rotation_turns_pairs_by_their_position():
    heads = normal(0, 2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 100, 3, 1]])
    turned = np.asarray(jit(rotate)(heads, positions))
    pairs = np.asarray(heads[..., :4]) + 1j * np.asarray(heads[..., 4:])
    angle = np.asarray(positions)[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(turned[..., :4], expected.real, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, rtol=1e-5, atol=1e-5)
    assert jit(rotate)(heads.astype(jnp.bfloat16), positions).dtype == jnp.bfloat16


def many(f, count):
    """Mean of f(rngs) over many keys, and its standard error."""
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), count)
    samples = np.asarray(jit(jax.vmap(lambda key: f(nnx.Rngs(dropout=key))))(keys))
    return samples.mean(0), samples.std(0) / np.sqrt(count)


def test_attention_dropout_drops_weights_one_by_one():
    attention = new(Attention, 16, 4, TransformerConfig(dropout=0.25))
    values = jnp.tile(jnp.eye(16)[None, :, None], (8, 1, 4, 1))
    even = jnp.zeros_like(values)
    weights = 16 * np.asarray(
        jit(lambda: attend(even, even, values, drop=partial(attention.dropout, rngs=rngs(0))))()
    )
    kept = np.isclose(weights, 4 / 3, rtol=1e-5)
    assert np.all(kept | (weights == 0))
    assert abs(kept.mean() - 0.75) < 0.03
    for axis in range(4):  # along none of them do weights share their fate
        assert np.any(kept.std(axis=axis) > 0)


def test_dropout_of_hidden_layer_and_branches():
    layer = new(EncoderLayer, 16, 4, 32, dropout=0.4, residual="plain")
    mean, error = many(lambda rngs: layer.feedforward(X, rngs=rngs), 2000)
    assert np.all(error > 0)
    branch = np.asarray(jit(lambda: layer.join(0, X, jnp.ones_like, rngs(0)))())
    kept = np.isclose(branch, LEVELS / (LEVELS - round(0.4 * LEVELS)))  # the keys here are rbg
    assert np.all(kept | (branch == 0))
    assert abs(kept.mean() - 0.6) < 0.1
    layer.eval()
    assert np.all(np.abs(mean - call(layer.feedforward, X)) < 6 * error)
    np.testing.assert_array_equal(layer.join(0, X, jnp.ones_like, None), 1)


def test_zero_dropout_and_evaluation_are_exact_and_keys_repeat():
    without, dropping = (new(EncoderLayer, 16, 4, dropout=rate) for rate in (0.0, 0.3))
    expected = call(without, X)
    np.testing.assert_array_equal(call(without, X, seed=0), expected)
    one, same, other = (call(dropping, X, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-2)
    assert not np.allclose(one, expected, atol=1e-2)
    dropping.eval()
    np.testing.assert_array_equal(call(dropping, X), expected)
    np.testing.assert_array_equal(call(dropping, X, seed=0), expected)
    dropping.train()
    np.testing.assert_array_equal(call(dropping, X, seed=0), one)


def test_layers_of_a_stack_drop_different_things_and_a_scan_the_same_ones():
    """Layers that add 1, or 2 and nothing where half of it is dropped."""
    added = []
    for scan in (True, False):
        stack = new(Encoder, 16, 2, 4, dropout=0.5, residual="residual", scan=scan)
        for path, param in nnx.to_flat_state(nnx.state(stack)):
            is_added = path[-3:] == ("feedforward", "down", "bias")
            param.set_value(jnp.full(param.shape, float(is_added)))
        added.append(np.round(np.asarray(call(stack, X, seed=0)) - np.asarray(X)))
    assert {*added[0].ravel()} == {0.0, 2.0, 4.0}  # 2 where one drops and the other does not
    np.testing.assert_array_equal(*added)


def test_bfloat16_scores_and_softmax_are_float32():
    """Scores of 240 to 240.75: bfloat16 would have them all 240 or 241."""
    q, k = np.ones((1, 4, 1, 16)), np.full((1, 4, 1, 16), 64.0)
    k[0, :, 0, 0] = 0, 1, 2, 3
    v = np.eye(4, 16)[None, :, None]
    expected = np.exp([0, 0.25, 0.5, 0.75]) / np.exp([0, 0.25, 0.5, 0.75]).sum()
    for options in ({}, {"is_causal": True}, {"drop": lambda weights: weights}):
        out = jit(partial(attend, **options))(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
        weights = np.asarray(out[0, -1, 0, :4], np.float32)
        np.testing.assert_allclose(weights, expected, rtol=2.0**-7, err_msg=str(options))


def test_wrong_options_are_user_errors():
    for options, text in (
        ({"width": 0}, "width is 0"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"heads": 3}, "heads=3 .* 1, 2, 4, 8, 16"),
        ({"kv_heads": 3}, "kv_heads=3 .* 1, 2, 4"),
        ({"feedforward": 0}, "feedforward is 0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"stochastic_depth": 1.0}, "stochastic_depth=1.0"),
        ({"activation": "gulu"}, 'activation "gulu".*"gelu"'),
        ({"attention": "flash"}, 'attention "flash"'),
        ({"residual": "rezer"}, 'residual rule "rezer".*"rezero"'),
        ({"alpha_per": "layers"}, 'alpha_per "layers".*"layer"'),
        ({"heads": 16, "rotary": True}, "rotary"),
    ):
        with pytest.raises(UserError, match=text):
            new(EncoderLayer, **{"width": 16, "heads": 4} | options)


def test_a_config_is_the_same_as_its_fields_as_arguments():
    config = TransformerConfig(residual="gated", feedforward=24, kv_heads=2)
    one = new(EncoderLayer, 16, 4, config=config, kv_heads=1)
    other = new(EncoderLayer, 16, 4, 24, residual="gated", kv_heads=1)
    assert nnx.graphdef(one) == nnx.graphdef(other)
    arguments = inspect.signature(Encoder).parameters  # as help() shows them
    assert {field.name for field in fields(TransformerConfig)} <= arguments.keys()
    with pytest.raises(UserError, match="give a TransformerConfig"):
        new(EncoderLayer, 16, 4, config=RuleConfig())


@pytest.mark.usefixtures("unchecked")
def test_wrong_calls_are_user_errors():
    layer = new(DecoderLayer, 16, 4, dropout=0.1)
    with pytest.raises(UserError, match=r"dropout needs rngs=nnx\.Rngs"):
        layer(X, MEMORY)
    layer.eval()
    for x in (X[0], X[..., :8], X[None]):
        with pytest.raises(UserError, match=r"takes \(batch, length, 16\), not"):
            layer(x, MEMORY)
    for memory in (MEMORY[0], MEMORY[..., :8], MEMORY[:2]):
        with pytest.raises(UserError, match=r"takes a memory \(3, length, 16\), not"):
            layer(X, memory)
    # PyTorch's additive masks would mean the opposite.
    for masks in (
        {"mask": np.zeros((7, 7))},
        {"key_mask": np.ones((3, 7), int)},
        {"memory_key_mask": np.ones((3, 5))},
    ):
        with pytest.raises(UserError, match=r"mask is bool, not (float|int)64; give True where"):
            layer(X, MEMORY, **masks)
    for name, shape in (
        ("mask", (7, 1)),
        ("mask", (3, 2, 7, 7)),
        ("mask", (1, 1, 1, 7, 7)),
        ("memory_mask", (7, 7)),
        ("key_mask", (7,)),
        ("memory_key_mask", (2, 5)),
    ):
        with pytest.raises(UserError, match=rf"mask has the shape .*, not \({shape[0]}, ?"):
            layer(X, MEMORY, **{name: np.ones(shape, bool)})
    with pytest.raises(UserError, match="a mask is bool, not list"):
        layer(X, MEMORY, [[True] * 7] * 7)
    with pytest.raises(UserError, match="depth is 0"):
        new(Encoder, 16, 0, 4)
