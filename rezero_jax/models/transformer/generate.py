"""Generation: continues prompts token by token, with a cache of keys and values, in one jit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from rezero_jax.errors import UserError, check_between
from rezero_jax.models.options import takes_options
from rezero_jax.models.transformer.attention import Cache, check_mask

Prompts = Sequence[Sequence[int]] | Array | np.ndarray

SHORTEST = 32  # prompts and caches have this length, or the next power of two
LanguageModel = Any  # a `Transformer`, whose file imports this one


@dataclass(frozen=True)
class SamplingConfig:
    """How `generate` picks tokens.

    Attributes:
      temperature: divides the logits; 0 picks the likeliest token.
      top_k: number of likeliest tokens to pick from; None is all.
      top_p: picks from the likeliest tokens that together reach this probability; None is 1.
      stop_token: ends a sequence, whose row is then filled up with this token; None never ends it.

    Raises:
      UserError: an option is out of range.
    """

    temperature: float | np.floating = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_token: int | np.integer | None = None

    def __post_init__(self) -> None:
        check_between(0, float(self.temperature), math.inf, "temperature")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} leaves no token; give at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not a probability; give one above 0, at most 1")


class Sampling(NamedTuple):
    """A `SamplingConfig` as traced numbers, so that another setting compiles nothing.

    The vocabulary's size, 1 and -1 stand for no top_k, top_p and stop_token.
    """

    temperature: float
    top_k: int
    top_p: float
    stop_token: int


class DecodingCarry(NamedTuple):
    """State of decoding between two tokens."""

    cache: list[Cache]
    logits: Float[Array, "batch vocab"]  # of the next token
    position: Int[Array, " batch"]  # of the next token
    done: Bool[Array, " batch"]  # whether the stop token was picked
    key: Array  # one for each sequence


@takes_options()
def generate(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    key_mask: Bool[Array | np.ndarray, "batch length"] | None = None,
    config: SamplingConfig = SamplingConfig(),
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Int[Array, "batch max_new_tokens"]:
    """Continues the prompts token by token, without dropout.

    A text that has max_len tokens continues from its last max_len / 2 tokens, and so does a prompt
    of max_len tokens or more.

    The programs are compiled for the number of prompts and for lengths rounded up to a power of
    two. Other prompts, options and seeds of the same rounded lengths compile nothing.

    Args:
      prompts: sequences of tokens, of any lengths; at least one token each.
      max_new_tokens: number of tokens to add.
      key_mask: False at the padding of prompts of one length, on whichever side.
      rngs: its stream "sample" draws the tokens; not needed at temperature 0.

    Raises:
      UserError: an argument is invalid.
    """
    pieces = stream(
        model, prompts, max_new_tokens, max_new_tokens, key_mask=key_mask, config=config, rngs=rngs
    )
    new = np.concatenate(list(pieces), axis=1)
    # After a stream has ended early, every row has its stop token.
    missing = ((0, 0), (0, max_new_tokens - new.shape[1]))
    new = np.pad(new, missing, constant_values=config.stop_token or 0)
    return jax.device_put(new)  # jnp.asarray would compile a copy for every shape


@takes_options()
def stream(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    chunk: int = 8,
    *,
    key_mask: Bool[Array | np.ndarray, "batch length"] | None = None,
    config: SamplingConfig = SamplingConfig(),
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yields the tokens of `generate` as they are picked, int32 (batch, `chunk` or fewer).

    The stream ends early when every sequence has had its stop token.
    """
    texts = _checked(model, prompts, max_new_tokens, key_mask)
    if config.stop_token is not None and not 0 <= config.stop_token < model.vocab_size:
        raise UserError(
            f"stop_token={config.stop_token} is not a token; give 0 .. {model.vocab_size - 1}"
        )
    if config.temperature > 0 and rngs is None:
        raise UserError("sampling needs rngs=nnx.Rngs(seed); give it, or temperature=0")
    sampling = Sampling(
        float(config.temperature),  # an int would compile again
        min(int(config.top_k or model.vocab_size), model.vocab_size),
        float(config.top_p or 1),
        -1 if config.stop_token is None else int(config.stop_token),
    )

    def draw() -> Array:
        return jax.random.split(jax.random.key(0) if rngs is None else rngs.sample(), len(texts))

    # Each text has its own number of windows, and the keys of a window do not depend on the others.
    draws, window, done = [draw()], np.zeros(len(texts), int), np.zeros(len(texts), bool)
    keys = draws[0]
    while max_new_tokens > 0:
        longest = max(map(len, texts))
        room = min(max_new_tokens, model.max_len - longest)
        powers = (1 << (size - 1).bit_length() for size in (longest, longest + room))
        sizes = [min(max(power, SHORTEST), model.max_len) for power in powers]
        tokens = np.zeros((len(texts), sizes[0]), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        lengths = np.array([len(text) for text in texts], np.int32)
        carry = _read_prompts(model, tokens, lengths, keys, done, sizes[1])
        for start in range(0, room, chunk):
            count = min(chunk, room - start)
            carry, padded = _next_chunk(model, carry, sampling, count)
            yield (new := np.asarray(padded)[:, :count])
            if (done := np.asarray(carry.done)).all():
                return
            for text, more in zip(texts, new.tolist(), strict=True):
                text += more
        max_new_tokens -= room
        for i, text in enumerate(texts):
            if len(text) == model.max_len:
                del text[: -(model.max_len // 2)]
                window[i] += 1
        draws += [draw() for _ in range(window.max() + 1 - len(draws))]
        for i in np.unique(window):
            keys = jnp.where(window == i, draws[i], keys)


def _checked(
    model: LanguageModel, prompts: Prompts, max_new_tokens: int, key_mask: Any
) -> list[list[int]]:
    """The tokens from which each text continues."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} asks for nothing; give at least 1")
    if model.max_len < 2:
        raise UserError("a model with max_len=1 has no room for a new token; make it larger")
    # A device array would be sliced on the device, row by row.
    given = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    rows = [np.asarray(prompt) for prompt in given]
    if not rows:
        raise UserError("there is no prompt; give at least one")
    if key_mask is not None:
        if any(row.shape != rows[0].shape for row in rows):
            raise UserError("a key mask needs prompts of one length; give prompts without padding")
        shape = (len(rows), *rows[0].shape)
        check_mask("a key mask", key_mask, shape)
        rows = [row[seen] for row, seen in zip(rows, np.broadcast_to(key_mask, shape), strict=True)]
    for row in rows:
        if not row.size:
            raise UserError("a prompt is empty; give at least one token to continue")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise UserError(f"give prompts of integer tokens, not of {row.dtype} {row.shape}")
    half = model.max_len // 2
    rows = [row[-half if len(row) >= model.max_len else 0 :] for row in rows]
    for row in rows:
        model.check(row[None])
    return [row.tolist() for row in rows]


@partial(jax.jit, static_argnames="cache_length")
def _read_prompts(
    model: LanguageModel, tokens: Any, lengths: Any, keys: Any, done: Any, cache_length: int
) -> DecodingCarry:
    """Reads the prompts; the padding's keys are overwritten before a query may attend to them."""
    model, (batch, length) = model.for_decoding(), tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    hidden, cache = model.decode(tokens, model.init_cache(batch, cache_length), positions)
    last = hidden[jnp.arange(batch), lengths - 1]
    return DecodingCarry(cache, model.logits(last), lengths, done, keys)


@partial(jax.jit, donate_argnames="carry")
def _next_chunk(
    model: LanguageModel, carry: DecodingCarry, sampling: Sampling, count: int | Array
) -> tuple[DecodingCarry, Array]:
    """Up to `count` more tokens, of an array (batch, cache length).

    The stop token fills the rest of a row. Another `count` compiles nothing.
    """
    model, (batch, length) = model.for_decoding(), carry.cache[0][0].shape[1:3]
    tokens = jnp.full((batch, length), jnp.maximum(sampling.stop_token, 0), jnp.int32)

    def unfinished(loop: tuple[Array, DecodingCarry, Array]) -> Array:
        i, now, _ = loop
        return (i < count) & ~now.done.all()

    def step(loop: tuple[Array, DecodingCarry, Array]) -> tuple[Array, DecodingCarry, Array]:
        i, now, tokens = loop
        keys = jax.vmap(jax.random.fold_in)(now.key, now.position)
        picked = pick(now.logits, keys, sampling)
        token = jnp.where(now.done, sampling.stop_token, picked)
        hidden, cache = model.decode(token[:, None], now.cache, now.position[:, None])
        done = now.done | (token == sampling.stop_token)
        now = DecodingCarry(cache, model.logits(hidden[:, 0]), now.position + 1, done, now.key)
        return i + 1, now, tokens.at[:, i].set(token)

    _, carry, tokens = jax.lax.while_loop(unfinished, step, (jnp.int32(0), carry, tokens))
    return carry, tokens


def pick(
    logits: Float[Array, "batch vocab"], keys: Array, sampling: Sampling
) -> Int[Array, " batch"]:
    """The next token of each sequence."""

    def filtered(scaled: Array) -> Array:
        descending = jnp.sort(scaled, axis=-1, descending=True)
        rank = jnp.arange(logits.shape[-1])[None]
        stays = rank < sampling.top_k
        probability = jax.nn.softmax(jnp.where(stays, descending, -jnp.inf))
        # A token stays if the tokens before it do not reach top_p: the likeliest always stays.
        stays &= jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
        least = jnp.where(stays, descending, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(scaled >= least, scaled, -jnp.inf)

    likeliest = logits.argmax(axis=-1)
    scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    few = (sampling.top_k < logits.shape[-1]) | (sampling.top_p < 1)
    scaled = jax.lax.cond(few, filtered, lambda scaled: scaled, scaled)
    sampled = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(sampling.temperature > 0, sampled, likeliest).astype(jnp.int32)
