"""The language model: its embeddings, its twins, its counts and its losses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.models.build import make_language_model
from rezero_jax.models.transformer import model as transformer
from rezero_jax.models.transformer.model import Transformer, sinusoids
from rezero_jax.training.state import model_spec
from tests import families
from tests.families import assert_trees_close

VOCAB, WIDTH, DEPTH, HEADS, LENGTH = 13, 8, 2, 4, 7
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB, (3, LENGTH)), jnp.int32)
TARGETS = jnp.asarray(RNG.integers(0, VOCAB, (3, LENGTH)), jnp.int32)


def structure_of(**options):
    options = {"residual": "rezero", "max_len": 16} | options
    sizes = (options.pop(k, d) for k, d in (("vocab_size", VOCAB), ("width", WIDTH)))
    make = functools.partial(
        Transformer, *sizes, options.pop("depth", DEPTH), options.pop("heads", HEADS), **options
    )
    return model_spec(lambda rngs: make(rngs=rngs))


def some_params(structure, gate=0.5, seed=1):
    """Random parameters, gates around `gate`; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        if structure.parameters[path_text(path)].is_gate:
            values = gate * rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(size=leaf.shape) / math.sqrt(WIDTH)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(value, structure.shapes)


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_are_the_papers(width):
    positions = np.array([[0, 1, 2, 3, 30], [5, 4, 100, 99, 98]])
    expected = np.zeros((*positions.shape, width))
    for place, position in np.ndenumerate(positions):
        for channel in range(width):
            angle = position / 10_000 ** (2 * (channel // 2) / width)
            expected[(*place, channel)] = (math.sin if channel % 2 == 0 else math.cos)(angle)
    np.testing.assert_allclose(sinusoids(jnp.asarray(positions), width), expected, atol=2e-5)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_the_trunk_starts_from_the_embedding_times_the_root_of_the_width(positions):
    structure = structure_of(positions=positions)
    params = some_params(structure, gate=0.0)
    expected = np.asarray(params["embedding"], np.float64)[TOKENS]
    if positions == "learned":
        expected = expected + np.asarray(params["position"])[:LENGTH]
    expected = expected * math.sqrt(WIDTH)
    if positions == "sinusoidal":
        expected = expected + np.asarray(sinusoids(jnp.arange(LENGTH)[None], WIDTH))
    hidden = jax.jit(lambda model: model.hidden(TOKENS))(structure.model(params, {}))
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-6)


def test_embeddings_and_head_start_uniform():
    make = jax.jit(lambda: Transformer(100, 32, 2, 4, 64, positions="learned", rngs=nnx.Rngs(1)))
    model = make()
    for name, shape in (("embedding", (100, 32)), ("position", (64, 32)), ("head", (32, 100))):
        values = np.asarray(getattr(model, name)[...], np.float64)
        assert values.shape == shape
        assert -0.1 <= values.min() < -0.099
        assert 0.099 < values.max() <= 0.1
        quarters = np.histogram(values, bins=4, range=(-0.1, 0.1))[0] / values.size
        np.testing.assert_allclose(quarters, 0.25, atol=4 * math.sqrt(3 / 16 / values.size))
    assert not np.any(model.head_bias[...])
    corners = [getattr(model, name)[0, 0] for name in ("embedding", "position", "head")]
    assert len(set(map(float, corners))) == 3


@pytest.mark.slow
def test_a_tied_head_is_the_embedding_and_feels_both_its_uses():
    tied, untied = structure_of(tied=True), structure_of()
    params = some_params(tied)
    assert untied.parameter_count - tied.parameter_count == VOCAB * WIDTH

    def loss(params, structure):
        logits = structure.model(params, {})(TOKENS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
        return losses.mean(), logits

    def gradients(params, structure):
        return jax.jit(jax.grad(functools.partial(loss, structure=structure), has_aux=True))(params)

    grads, logits = gradients(params, tied)
    untied_grads, untied_logits = gradients(params | {"head": params["embedding"].T}, untied)
    np.testing.assert_allclose(logits, untied_logits, rtol=1e-5, atol=1e-6)
    head = untied_grads.pop("head")
    for use in (head.T, untied_grads["embedding"]):
        assert np.abs(use).max() > 1e-3
    both = untied_grads | {"embedding": untied_grads["embedding"] + head.T}
    assert_trees_close(grads, both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ("transformer_enwik8.py:depth=12", 38_066_444),
        ("transformer_enwik8.py:depth=64", 50_610_496),
        ("transformer_enwik8.py:depth=128", 101_089_664),
        ("transformer_notebook.py:depth=128", 16_957_824),
    ],
)
def test_the_papers_and_the_notebooks_networks_have_their_parameter_counts(config, total):
    model = families.config(config).model
    assert model_spec(make_language_model(model)).parameter_count == total


def test_parameter_counts_of_variants():
    for options, change in (
        ({}, 0),
        ({"residual": "gated", "final_norm": True}, 24),
        ({"positions": "learned"}, 20 * 12),
        ({"tied": True}, -13 * 12),
        ({"kv_heads": 2}, -2 * 2 * 6 * (12 + 1)),
        ({"bias": False}, -2 * (36 + 12 + 48 + 12) - 13),
        ({"feedforward": 5}, -2 * (48 - 5) * (12 + 12 + 1)),
        ({"alpha_per": "sublayer"}, 2),
        ({"residual": "gpt2_norm", "alpha_per": "sublayer"}, -2 + 4 * 24),
        ({"residual": "pre_norm", "final_norm": True}, -2 + 5 * 24),
    ):
        spec = structure_of(width=12, max_len=20, **options)
        assert spec.parameter_count == 3999 + change, options


def products(jaxpr):
    """The dtypes of the factors of every matrix product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [factor.aval.dtype for factor in equation.invars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits():
    narrow = structure_of(dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.shapes))
    traced = jax.make_jaxpr(narrow.model(some_params(narrow), {}))(TOKENS)
    assert traced.out_avals[0].dtype == jnp.float32
    factors = list(products(traced.jaxpr))
    assert len(factors) == 7  # of a layer 6, which is scanned, and the head
    assert all(dtype == jnp.bfloat16 for pair in factors for dtype in pair)


@pytest.mark.parametrize("chunk", [LENGTH, 1])
def test_losses_are_the_cross_entropy_of_the_next_token(chunk, monkeypatch):
    monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", chunk * TOKENS.shape[0] * VOCAB)
    structure = structure_of()
    model = structure.model(some_params(structure), {})
    losses, logits = jax.jit(lambda m: (m.losses(TOKENS, TARGETS), m(TOKENS)))(model)
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for place, loss in np.ndenumerate(losses):
        expected = -math.log(probabilities[place][TARGETS[place]])
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert np.std(losses) > 0.1


def test_models_that_cannot_be():
    for options, text in (
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_len": 0}, "max_len is 0"),
        ({"positions": "rotery"}, 'positions "rotery".*"rotary"'),
        ({"depth": 0}, "depth is 0"),
    ):
        with pytest.raises(UserError, match=text):
            structure_of(**options)


@pytest.mark.usefixtures("unchecked")
def test_tokens_that_cannot_be():
    structure = structure_of()
    model = structure.model(some_params(structure), {})
    for tokens, text in (
        ([[0.0, 1.0]], r"integer tokens .*float32 of shape \(1, 2\)"),
        ([0, 1], r"integer tokens .*int32 of shape \(2,\)"),
        ([[0] * 17], "17 tokens .*max_len=16"),
        ([[0, 13]], "token 13 .*vocab_size"),
        ([[-1, 99]], "token -1 .*0 .. 12"),
    ):
        with pytest.raises(UserError, match=text):
            model(jnp.asarray(tokens))
        if "integer" not in text and "max_len" not in text:
            with pytest.raises(UserError, match=text):
                model.losses(jnp.zeros((1, 2), jnp.int32), jnp.asarray(tokens))
    for targets in (TARGETS[:, :5], TARGETS[:2], TARGETS[0]):
        with pytest.raises(UserError, match=r"tokens are \(3, 7\) and targets"):
            model.losses(TOKENS, targets)
    for mask, text in (
        (np.ones((3, 6), bool), r"key mask has the shape \(3, 7\)"),
        (np.ones((3, 7)), "key mask is bool, not float64"),
    ):
        with pytest.raises(UserError, match=text):
            model(TOKENS, mask)


def test_in_a_compiled_function_a_token_outside_the_vocabulary_gives_nan():
    structure = structure_of()
    model = structure.model(some_params(structure), {})
    tokens = jnp.asarray([[1, 2, VOCAB - 1, 3], [1, 2, VOCAB, 3], [1, 2, -1, 3]])
    logits = jax.jit(lambda m, t: m(t))(model, tokens)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1:, 2:]).all()
    valid = jnp.broadcast_to(tokens[:1], tokens.shape)
    losses = jax.jit(lambda m, t, targets: m.losses(t, targets))(model, valid, tokens)
    np.testing.assert_array_equal(np.isnan(losses), (tokens < 0) | (tokens >= VOCAB))


def test_an_ignored_target_has_no_loss_and_no_gradient_in_chunks_or_not(monkeypatch):
    structure = structure_of()
    ignored = jnp.asarray(RNG.random(TARGETS.shape) < 0.4)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, targets, weight):
        losses = structure.model(params, {}).losses(TOKENS, targets)
        return (losses * weight).sum(), losses

    params, weight = some_params(structure), 1.0 - ignored
    (_, all_losses), expected = jax.jit(run)(params, TARGETS, weight)
    given = params, jnp.where(ignored, -100, TARGETS), jnp.ones_like(weight)
    for chunk in (LENGTH, 1):
        monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", chunk * TOKENS.shape[0] * VOCAB)
        traced = jax.jit(lambda *args: run(*args)).trace(*given)
        (_, losses), grads = traced.lower().compile()(*given)
        # No array has the logits of more positions.
        sizes = {n for n in range(1, LENGTH + 1) if f"f32[3,{n},{VOCAB}]" in str(traced.jaxpr)}
        assert sizes == {chunk}
        np.testing.assert_allclose(losses, np.where(ignored, 0, all_losses), rtol=1e-6)
        assert_trees_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_targets_of_bytes_have_losses_of_their_own():
    structure = structure_of(vocab_size=256)
    model = structure.model(some_params(structure), {})
    tokens = jnp.array([[1, 2, 156]], jnp.uint8)  # -100 as uint8 is 156
    losses = jax.jit(lambda model, tokens: model.losses(tokens, tokens))
    expected = losses(model, tokens.astype(jnp.int32))
    np.testing.assert_array_equal(losses(model, tokens), expected)
    assert (expected > 0).all()


@pytest.mark.parametrize(
    "options",
    [{"positions": "learned", "scan": False}, {"positions": "rotary"}],
)
def test_padding_on_either_side_changes_no_other_logits_and_losses(options):
    structure = structure_of(**options)
    model = structure.model(some_params(structure), {})
    run = jax.jit(lambda m, *args: (m(args[0], *args[2:]), m.losses(*args)))
    logits, losses = run(model, TOKENS[:1], TARGETS[:1])
    seen = np.zeros((3, 12), bool)
    seen[0, 5:] = seen[1, :7] = seen[2, [0, 1, 4, 5, 6, 10, 11]] = True
    tokens, targets = np.zeros((2, 3, 12), np.int32)
    tokens[seen], targets[seen] = np.tile(TOKENS[0], 3), np.tile(TARGETS[0], 3)
    padded_logits, padded_losses = map(np.asarray, run(model, tokens, targets, jnp.asarray(seen)))
    shown = padded_logits[seen].reshape(3, 7, VOCAB)
    np.testing.assert_allclose(shown, np.tile(logits, (3, 1, 1)), rtol=1e-4, atol=1e-5)
    shown = padded_losses[seen].reshape(3, 7)
    np.testing.assert_allclose(shown, np.tile(losses, (3, 1)), rtol=1e-4, atol=1e-5)
    assert (padded_losses[~seen] == 0).all()


def test_no_sequences_give_no_logits_and_empty_ones_are_refused():
    structure = structure_of(residual="mhc")
    model = structure.model(some_params(structure), {})
    tokens = jnp.zeros((0, 5), jnp.int32)
    logits, losses = jax.eval_shape(lambda m, t: (m(t), m.losses(t, t)), model, tokens)
    assert (logits.shape, losses.shape) == ((0, 5, VOCAB), (0, 5))
    with pytest.raises(UserError, match="sequences are empty"):
        model(jnp.zeros((2, 0), jnp.int32))
