"""Generation: continues prompts token by token, with a cache of keys and values, in one jit."""

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

from rezero_jax.errors import UserError
from rezero_jax.models.options import takes_options
from rezero_jax.models.transformer.attention import Cache

Prompts = Sequence[Sequence[int]] | Array | np.ndarray

LENGTH_MULTIPLE = 32  # prompts and caches are padded to a multiple: few lengths are compiled
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
        if not self.temperature >= 0:
            raise UserError(
                f"temperature={self.temperature} is not 0 or more; 0 picks the likeliest token"
            )
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
    config: SamplingConfig = SamplingConfig(),
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Int[Array, "batch max_new_tokens"]:
    """Continues the prompts token by token, without dropout; compiled once for similar sizes.

    Args:
      prompts: sequences of tokens, of any lengths; at least one token each.
      max_new_tokens: number of tokens to add; with the longest prompt at most max_len.
      rngs: its stream "sample" draws the tokens; not needed at temperature 0.

    Raises:
      UserError: an argument is invalid.
    """
    pieces = stream(model, prompts, max_new_tokens, max_new_tokens, config=config, rngs=rngs)
    return jnp.asarray(next(pieces))


@takes_options()
def stream(
    model: LanguageModel,
    prompts: Prompts,
    max_new_tokens: int,
    chunk: int = 8,
    *,
    config: SamplingConfig = SamplingConfig(),
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yields the tokens of `generate` as they are picked, int32 (batch, `chunk` or fewer).

    The stream ends early when every sequence has had its stop token.
    """
    tokens, lengths = _padded(model, prompts, max_new_tokens)
    if config.stop_token is not None and not 0 <= config.stop_token < model.vocab_size:
        raise UserError(
            f"stop_token={config.stop_token} is not in the vocabulary; give one of 0 .. "
            f"{model.vocab_size - 1}"
        )
    if config.temperature > 0 and rngs is None:
        raise UserError("sampling needs rngs=nnx.Rngs(seed); give it, or temperature=0")
    keys = jax.random.split(jax.random.key(0) if rngs is None else rngs.sample(), len(tokens))
    sampling = Sampling(
        float(config.temperature),  # an int would compile again
        min(int(config.top_k or model.vocab_size), model.vocab_size),
        float(config.top_p or 1),
        -1 if config.stop_token is None else int(config.stop_token),
    )
    filtered = config.top_k is not None or config.top_p is not None
    cache_length = min(_round_up(tokens.shape[1] + max_new_tokens), model.max_len)
    carry = _read_prompts(model, tokens, lengths, keys, cache_length)
    for start in range(0, max_new_tokens, chunk):
        carry, new = _next_chunk(model, carry, sampling, chunk, filtered)
        yield np.asarray(new)[:, : max_new_tokens - start]
        if bool(carry.done.all()):
            return


def _padded(
    model: LanguageModel, prompts: Prompts, max_new_tokens: int
) -> tuple[Int[Array, "batch padded"], Int[Array, " batch"]]:
    """The prompts, padded to one length, and their lengths."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} asks for nothing; give at least 1")
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows or any(not row.size for row in rows):
        raise UserError("a prompt is empty; give at least one token to continue")
    for row in rows:
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise UserError(
                f"a prompt is a sequence of integer tokens, not {row.dtype} of shape {row.shape}; "
                "convert it"
            )
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = int(lengths.max())
    if longest + max_new_tokens > model.max_len:
        raise UserError(
            f"{longest} tokens of prompt and {max_new_tokens} new ones are more than "
            f"max_len={model.max_len}; shorten one of them"
        )
    padded = min(_round_up(longest), model.max_len)
    tokens = np.zeros((len(rows), padded), np.int64)  # wide enough to be checked
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    model.check(tokens)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths)


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@partial(jax.jit, static_argnames="cache_length")
def _read_prompts(
    model: LanguageModel, tokens: Array, lengths: Array, keys: Array, cache_length: int
) -> DecodingCarry:
    """Reads the prompts; the padding's keys are overwritten before a query may attend to them."""
    model, (batch, length) = model.for_decoding(), tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    hidden, cache = model.decode(tokens, model.init_cache(batch, cache_length), positions)
    last = hidden[jnp.arange(batch), lengths - 1]
    return DecodingCarry(cache, model.logits(last), lengths, jnp.zeros(batch, bool), keys)


@partial(jax.jit, static_argnames=("count", "filtered"), donate_argnames="carry")
def _next_chunk(
    model: LanguageModel, carry: DecodingCarry, sampling: Sampling, count: int, filtered: bool
) -> tuple[DecodingCarry, Array]:
    """Up to `count` more tokens (batch, count); the stop token fills the rest of a row."""
    model, batch = model.for_decoding(), carry.position.shape[0]
    tokens = jnp.full((batch, count), jnp.maximum(sampling.stop_token, 0), jnp.int32)

    def unfinished(loop: tuple[Array, DecodingCarry, Array]) -> Array:
        i, now, _ = loop
        return (i < count) & ~now.done.all()

    def step(loop: tuple[Array, DecodingCarry, Array]) -> tuple[Array, DecodingCarry, Array]:
        i, now, tokens = loop
        keys = jax.vmap(jax.random.fold_in)(now.key, now.position)
        picked = pick(now.logits, keys, sampling, filtered)
        token = jnp.where(now.done, sampling.stop_token, picked)
        hidden, cache = model.decode(token[:, None], now.cache, now.position[:, None])
        done = now.done | (token == sampling.stop_token)
        now = DecodingCarry(cache, model.logits(hidden[:, 0]), now.position + 1, done, now.key)
        return i + 1, now, tokens.at[:, i].set(token)

    _, carry, tokens = jax.lax.while_loop(unfinished, step, (jnp.int32(0), carry, tokens))
    return carry, tokens


def pick(
    logits: Float[Array, "batch vocab"], keys: Array, sampling: Sampling, filtered: bool
) -> Int[Array, " batch"]:
    """The next token of each sequence; `filtered` is whether top_k or top_p is set."""
    likeliest = logits.argmax(axis=-1)
    scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    if filtered:
        descending = jnp.sort(scaled, axis=-1, descending=True)
        rank = jnp.arange(logits.shape[-1])[None]
        stays = rank < sampling.top_k
        probability = jax.nn.softmax(jnp.where(stays, descending, -jnp.inf))
        # A token stays if the tokens before it do not reach top_p: the likeliest always stays.
        stays &= jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
        least = jnp.where(stays, descending, jnp.inf).min(axis=-1, keepdims=True)
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    sampled = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(sampling.temperature > 0, sampled, likeliest).astype(jnp.int32)
