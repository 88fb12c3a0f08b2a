"""Generation against the model without a cache, and sampling against its probabilities."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax.errors import UserError
from rezero_jax.models.transformer import generate
from rezero_jax.models.transformer import model as transformer
from rezero_jax.models.transformer.generate import Sampling, pick, stream
from tests.families import unrolled
from tests.test_transformer import VOCAB, some_params, structure_of

MAX_LEN, NEW = 64, 24
CASES = {
    "sinusoidal": {},
    "learned": {"positions": "learned", "tied": True, "kv_heads": 1, "scan": False},
    "rotary": {"positions": "rotary", "kv_heads": 2, "residual": "pre_norm", "final_norm": True},
}
RNG = np.random.default_rng(0)


# About the multiple of 32 to which prompts are padded, and up to max_len with what is added.
PROMPTS = [RNG.integers(0, VOCAB, length).tolist() for length in (1, 5, 31, 32, 33, MAX_LEN - NEW)]

forward = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def made(case, **options):
    structure = structure_of(max_len=MAX_LEN, **CASES[case], **options)
    return structure.model(some_params(structure), {})


@functools.cache
def likeliest(case):
    """What `generate` adds to PROMPTS at temperature 0."""
    return np.asarray(made(case).generate(PROMPTS, NEW, temperature=0))


def texts(new):
    """PROMPTS with what was added to them, and zeros up to max_len."""
    rows = [[*prompt, *added] for prompt, added in zip(PROMPTS, new.tolist(), strict=True)]
    return np.array([row + [0] * (MAX_LEN - len(row)) for row in rows])


def logits_before(model, new):
    """The logits that each of the added tokens was picked from, by the model without a cache."""
    logits = np.asarray(forward(model, jnp.asarray(texts(new))), np.float64)
    return np.stack([logits[i, len(p) - 1 :][:NEW] for i, p in enumerate(PROMPTS)])


@pytest.mark.parametrize(
    "case",
    ["rotary", *(pytest.param(c, marks=pytest.mark.slow) for c in ("sinusoidal", "learned"))],
)
def test_generating_with_a_cache_is_calling_the_model_token_by_token(case):
    expected = np.zeros((len(PROMPTS), NEW), int)
    for i in range(NEW):
        expected[:, i] = logits_before(made(case), expected)[:, i].argmax(axis=-1)
    np.testing.assert_array_equal(likeliest(case), expected)
    assert len(np.unique(expected)) > 3


@pytest.mark.parametrize(
    "case",
    ["learned", *(pytest.param(c, marks=pytest.mark.slow) for c in ("sinusoidal", "rotary"))],
)
def test_logits_with_a_cache_are_those_of_the_whole_text(case):
    model, lengths = made(case), np.array([1, 2, 3, 4, 5, 6])
    tokens = np.random.default_rng(1).integers(0, VOCAB, (6, MAX_LEN))
    expected = forward(model, jnp.asarray(tokens))

    @jax.jit
    def decode(model, tokens, cache, positions):
        hidden, cache = model.decode(tokens, cache, positions)
        return model.logits(hidden), cache

    # Six tokens of each row at once, of which some are then taken for padding.
    positions, rows = np.tile(np.arange(6), (6, 1)), np.arange(6)[:, None]
    cache = model.init_cache(6, 12)
    for _ in range(7):
        known = jnp.asarray(tokens[rows, positions])
        logits, cache = decode(model, known, cache, jnp.asarray(positions))
        np.testing.assert_allclose(logits, expected[rows, positions], rtol=1e-5, atol=1e-5)
        positions = lengths[:, None] if positions.shape[1] > 1 else positions + 1


def test_a_row_does_not_depend_on_the_others():
    for row in (0, 3):  # padded to 32 among short prompts, and to 64 together
        new = made("sinusoidal").generate([PROMPTS[row]] * 6, NEW, temperature=0)
        np.testing.assert_array_equal(new, np.tile(likeliest("sinusoidal")[row], (6, 1)))


def test_a_model_with_dropout_generates_without_and_stays_as_it_is():
    model = made("sinusoidal", dropout=0.5)
    graph = nnx.graphdef(model)
    new = model.generate(PROMPTS, NEW, temperature=0)
    np.testing.assert_array_equal(new, likeliest("sinusoidal"))
    assert nnx.graphdef(model) == graph


def lines_of_program(depth):
    """Of the program that generates, as the compiler gets it."""
    structure = structure_of(max_len=MAX_LEN, depth=depth)
    model = structure.model(structure.shapes, {})
    one = np.ones(1, np.int32)
    arguments = model, one[None], one, jax.random.split(jax.random.key(0), 1), one < 1
    carry = generate._read_prompts.eval_shape(*arguments, 32)
    sampling = Sampling(0.0, VOCAB, 1.0, -1)
    lowered = generate._next_chunk.lower(model, carry, sampling, 2)
    return len(lowered.as_text().splitlines())


def test_the_program_does_not_grow_with_the_depth_of_a_scanned_stack(monkeypatch):
    monkeypatch.setattr(transformer, "UNROLLED_DECODING", 3)
    assert lines_of_program(4) == lines_of_program(64) < lines_of_program(3)


def test_a_scan_over_layers_generates_what_they_do_one_by_one(monkeypatch):
    monkeypatch.setattr(transformer, "UNROLLED_DECODING", 0)
    scanned = made("rotary", depth=3)
    one_by_one = nnx.clone(scanned)
    one_by_one.trunk.layers = unrolled(scanned.trunk.layers)
    new, expected = (
        model.generate(PROMPTS, NEW, rngs=nnx.Rngs(2)) for model in (scanned, one_by_one)
    )
    np.testing.assert_array_equal(new, expected)
    assert len(np.unique(expected)) > 3


def test_the_stop_token_ends_its_row_and_no_other():
    free = likeliest("sinusoidal")
    # One that some rows pick in their midst and others never.
    ends = {token: (free == token).any(axis=1).sum() for token in range(VOCAB)}
    stop = next(token for token, rows in ends.items() if 2 <= rows <= 4)
    stopped = made("sinusoidal").generate(PROMPTS, NEW, temperature=0, stop_token=stop)
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        end = expected.index(stop) if stop in expected else NEW
        assert row == expected[:end] + [stop] * (NEW - end)


def test_a_stream_is_what_generate_gives_in_chunks_until_every_row_has_stopped():
    model = made("sinusoidal")
    whole = model.generate(PROMPTS, NEW, temperature=0.8, rngs=nnx.Rngs(3))
    options = {"temperature": 0.8, "rngs": nnx.Rngs(3)}
    chunks = list(stream(model, PROMPTS, NEW, chunk=5, **options))
    assert [chunk.shape[1] for chunk in chunks] == [5, 5, 5, 5, 4]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole)
    row = likeliest("sinusoidal")[4].tolist()
    stop = next(token for token in row[6:] if token not in row[:6])
    end = row.index(stop)
    assert end < 15
    options = {"temperature": 0, "stop_token": stop}
    chunks = list(stream(model, [PROMPTS[4]] * 6, NEW, chunk=5, **options))
    assert [chunk.shape for chunk in chunks] == [(6, 5)] * (end // 5 + 1)
    for streamed in np.concatenate(chunks, axis=1).tolist():
        assert streamed == row[:end] + [stop] * (len(streamed) - end)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def filtered_softmax(logits, temperature, top_k, top_p):
    """Probabilities of one token: the k likeliest, then those of them that together reach p."""
    probabilities = softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-probabilities)[:top_k]
    probabilities = probabilities / probabilities[order].sum()
    kept, total = [], 0.0
    for token in order:
        if total < top_p:
            kept.append(token)
            total += probabilities[token]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def chi_squared(counts, probabilities):
    """Over what is possible; what is not must not have happened."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible]
    assert expected.min() > 5
    return ((counts[possible] - expected) ** 2 / expected).sum()


def test_two_tokens_are_sampled_as_often_as_they_are_probable():
    """The second given the first, so that the draws are independent too."""
    vocab, count, temperature = 4, 4_000, 1.5
    structure = structure_of(vocab_size=vocab, max_len=8)
    model = structure.model(some_params(structure), {})
    prompt = [2, 0, 1]
    pairs = np.asarray(
        model.generate([prompt] * count, 2, temperature=temperature, rngs=nnx.Rngs(0))
    )
    logits = forward(model, jnp.asarray([[*prompt, token] for token in range(vocab)]))
    probabilities = softmax(np.asarray(logits[:, 2:], np.float64) / temperature)
    joint = probabilities[0, 0][:, None] * probabilities[:, 1]
    counts = np.bincount(pairs[:, 0] * vocab + pairs[:, 1], minlength=vocab**2)
    # 15 degrees of freedom: above 45 in fewer than 1 of 10,000 cases.
    assert chi_squared(counts, joint.ravel()) < 45
    uniform = np.full(vocab**2, 1 / vocab**2)
    assert chi_squared(counts, uniform) > 450


LOGITS = np.array([[0.3, -1.0, 1.9, 0.9, 0.0, 1.2], [2.0, 2.4, -3.0, 1.0, 0.5, -0.5]], np.float32)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "sizes"),
    [
        (1.0, 6, 1.0, (6, 6)),
        (1.0, 3, 1.0, (3, 3)),
        (2.0, 6, 0.7, (4, 3)),
        (1.0, 3, 0.7, (2, 2)),
        (1.0, 6, 1e-6, (1, 1)),
        (1.0, 1, 1.0, (1, 1)),
    ],
)
def test_filtered_tokens_are_never_picked_and_the_others_as_often_as_they_should(
    temperature, top_k, top_p, sizes
):
    count = 3_000
    sampling = Sampling(temperature, top_k, top_p, -1)
    keys = jax.random.split(jax.random.key(1), 2 * count)
    picked = PICK(jnp.repeat(jnp.asarray(LOGITS), count, axis=0), keys, sampling)
    for row, tokens, size in zip(LOGITS, np.asarray(picked).reshape(2, count), sizes, strict=True):
        probabilities = filtered_softmax(row, temperature, top_k, top_p)
        assert (probabilities > 0).sum() == size
        # At most 5 degrees of freedom: above 26 in fewer than 1 of 10,000 cases.
        assert chi_squared(np.bincount(tokens, minlength=6), probabilities) < 26


PICK = jax.jit(pick)


def test_the_seed_decides_the_text():
    model = made("sinusoidal")

    def text(rngs):
        return np.asarray(model.generate(PROMPTS, NEW, rngs=rngs))

    rngs = nnx.Rngs(4)
    first, second = text(rngs), text(rngs)
    np.testing.assert_array_equal(text(nnx.Rngs(4)), first)
    np.testing.assert_array_equal(text(nnx.Rngs(sample=4)), first)
    assert (second != first).any(axis=1).all()
    assert (text(nnx.Rngs(5)) != first).any(axis=1).all()


def test_lengths_settings_and_seeds_compile_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax"), "propagate", True)
    model, wide = made("sinusoidal"), jnp.full((6, 40), 2)
    calls = [
        *((PROMPTS, count, {"temperature": 0}) for count in (1, 12, NEW)),
        *(([[1] * n] * 6, 64 - n, {"temperature": 0.7}) for n in (33, 63)),
        (wide, NEW, {"temperature": 0, "stop_token": 3}),
        (np.asarray(wide), NEW, {"stop_token": np.int64(3)}),
        *(
            (PROMPTS, NEW, options)
            for options in (
                {"temperature": 1},
                {"temperature": np.float32(1.3)},
                {"top_k": 2},
                {"top_k": 99, "top_p": 1},
                {"top_p": 0.5, "temperature": 2},
            )
        ),
    ]
    model.generate(PROMPTS, 1, temperature=0)
    nnx.Rngs(0).sample()
    with jax.log_compiles():
        for seed, (prompts, count, options) in enumerate(calls):
            assert model.generate(prompts, count, rngs=nnx.Rngs(seed), **options).shape[1] == count
        assert "Compiling" not in caplog.text
        model.generate(PROMPTS[:3], 1, temperature=0)  # another number of prompts does
        assert "Compiling" in caplog.text


def test_a_longer_text_starts_with_the_shorter_one_to_the_bit():
    model, prompts = made("rotary"), [PROMPTS[1]] * 6
    longest = np.asarray(model.generate(prompts, 100, rngs=nnx.Rngs(0)))
    assert len({tuple(row) for row in longest.tolist()}) == 6
    for count in (1, 26, 27, 28, 59, 60):  # with caches of 32 and of 64 tokens, and beyond
        shorter = model.generate(prompts, count, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(shorter, longest[:, :count])


def test_a_text_of_max_len_tokens_continues_from_its_last_half():
    """Of each row by itself, and long prompts do."""
    model, half = made("sinusoidal"), MAX_LEN // 2
    rows = [RNG.integers(0, VOCAB, n).tolist() for n in (3, 60, MAX_LEN, 150, 1, 32)]
    new = np.asarray(model.generate(rows, 80, temperature=0))
    for row, text in zip(new[:4].tolist(), rows[:4], strict=True):
        expected = []
        while len(expected) < 80:
            text = text if len(text) < MAX_LEN else text[-half:]
            more = model.generate([text] * 6, MAX_LEN - len(text), temperature=0)[0].tolist()
            text, expected = text + more, expected + more
        assert row == expected[:80]
    sampled = np.asarray(model.generate(rows, 80, rngs=nnx.Rngs(1)))
    alone = model.generate([rows[0], *[rows[0][:1]] * 5], 80, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(alone[0], sampled[0])
    assert not np.array_equal(sampled[0, :30], sampled[0, 40:70])


def test_padding_of_prompts_changes_nothing_to_the_bit():
    model, longest = made("rotary"), max(map(len, PROMPTS))
    tokens, seen = np.full((6, longest), 7), np.zeros((6, longest), bool)
    for i, prompt in enumerate(PROMPTS):
        place = slice(longest - len(prompt), None) if i % 2 else slice(len(prompt))
        tokens[i, place], seen[i, place] = prompt, True
    for given, mask in ((tokens, seen), (jnp.asarray(tokens), jnp.asarray(seen))):
        new = model.generate(given, NEW, key_mask=mask, temperature=0)
        np.testing.assert_array_equal(new, likeliest("rotary"))


@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_user_errors():
    for prompts, count, options, text in (
        ([[1]], 0, {}, "max_new_tokens=0"),
        ([[1]], 2, {"temperature": -0.5}, "temperature=-0.5"),
        ([[1]], 2, {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], 2, {"top_k": 0}, "top_k=0"),
        ([[1]], 2, {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], 2, {"stop_token": 13}, "stop_token=13"),
        ([[1]], 2, {"temperature": 0.5}, "rngs"),
        (np.zeros((0, 3), int), 2, {}, "there is no prompt"),
        ([[1, 2]], 2, {"key_mask": np.zeros((1, 2), bool)}, "prompt is empty"),
        ([[1, 2]], 2, {"key_mask": np.zeros((1, 3), bool)}, "key mask has the shape"),
        ([[1, 2]], 2, {"key_mask": np.ones((1, 2))}, "key mask is bool"),
        ([[1, 2], [1]], 2, {"key_mask": np.ones((2, 2), bool)}, "prompts of one length"),
        ([[1], []], 2, {}, "prompt is empty"),
        ([[1], [2, 13]], 2, {}, "token 13"),
        ([[-1]], 2, {}, "token -1"),
        ([[2**40]], 2, {}, "token 1099511627776"),
        ([[1.5]], 2, {}, "integer tokens.*float64"),
        ([1, 2], 2, {}, "integer tokens.*int64"),
        ([b"ab"], 2, {}, "integer tokens.*S2"),
    ):
        with pytest.raises(UserError, match=text):
            made("sinusoidal").generate(prompts, count, **{"temperature": 0} | options)
