"""Generation: prompts continued token by token, with a cache of keys and values, under one jit."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from rezero_jax.errors import UserError
from rezero_jax.models.transformer.attention import Cache
from rezero_jax.stack import unstacked

if TYPE_CHECKING:
    from rezero_jax.models.transformer.model import Transformer

Prompts = Sequence[Sequence[int]] | Array | np.ndarray

ROUND = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


class Choice(NamedTuple):
    """How a token is picked; traced, so that another setting compiles nothing.

    Attributes:
      temperature: divides the logits; 0 picks the likeliest token.
      top_k: only this many of the likeliest tokens are picked from.
      top_p: only the likeliest tokens are picked from that together reach this probability.
      stop_token: ends a sequence; -1 is none.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    stop_token: Any


class Decoding(NamedTuple):
    """Sequences under way.

    Attributes:
      cache: keys and values of the tokens so far, per layer.
      logits: of the next token.
      position: where the next token goes.
      done: whether the stop token was picked.
      key: source of randomness of each sequence.
    """

    cache: list[Cache]
    logits: Float[Array, "batch vocab"]
    position: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    key: Array


class Request(NamedTuple):
    """Checked arguments: prompts padded to one length, their own lengths, a key for each."""

    tokens: Int[Array, "batch padded"]
    lengths: Int[Array, " batch"]
    keys: Array
    choice: Choice
    filtered: bool
    room: int


def generate(
    model: "Transformer", prompts: Prompts, max_new_tokens: int, **options: Any
) -> Int[Array, "batch max_new_tokens"]:
    """See `Transformer.generate`."""
    request = _request(model, prompts, max_new_tokens, **options)
    *arrays, filtered, room = request
    return _generate(model, *arrays, max_new_tokens, filtered, room)


def stream(
    model: "Transformer", prompts: Prompts, max_new_tokens: int, chunk: int = 8, **options: Any
) -> Iterator[np.ndarray]:
    """The tokens of `Transformer.generate` as they come: int32 (batch, `chunk`), the last fewer.

    Ends early when every sequence has had its stop token. The options are those of `generate`.
    """
    tokens, lengths, keys, choice, filtered, room = _request(
        model, prompts, max_new_tokens, **options
    )
    decoding = _begin(model, tokens, lengths, keys, room)
    for start in range(0, max_new_tokens, chunk):
        decoding, new = _go_on(model, decoding, choice, chunk, filtered)
        yield np.asarray(new)[:, : max_new_tokens - start]
        if bool(decoding.done.all()):
            return


def _request(
    model: "Transformer",
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> Request:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} asks for nothing; give at least 1")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} is not 0 or more; 0 picks the likeliest token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} leaves no token; give at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is no probability; give one above 0, at most 1")
    if stop_token is not None and not 0 <= stop_token < model.vocab_size:
        raise UserError(
            f"stop_token={stop_token} is not in the vocabulary; give one of 0 .. "
            f"{model.vocab_size - 1}"
        )
    if temperature > 0 and rngs is None:
        raise UserError("sampling needs rngs=nnx.Rngs(seed); give it, or temperature=0")
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows or any(not row.size for row in rows):
        raise UserError("a prompt is empty; give at least one token to go on from")
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
    for row, place in zip(rows, tokens, strict=True):
        place[: len(row)] = row
    model.check(tokens)
    key = jax.random.key(0) if rngs is None else rngs.sample()
    choice = Choice(
        float(temperature),  # an int would compile anew
        model.vocab_size if top_k is None else min(int(top_k), model.vocab_size),
        1.0 if top_p is None else float(top_p),
        -1 if stop_token is None else int(stop_token),
    )
    return Request(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(lengths),
        jax.random.split(key, len(rows)),
        choice,
        top_k is not None or top_p is not None,
        min(_round_up(padded + max_new_tokens), model.max_len),
    )


def _round_up(length: int) -> int:
    return -(-length // ROUND) * ROUND


def _prefill(
    model: "Transformer", tokens: Array, lengths: Array, keys: Array, room: int
) -> Decoding:
    """Reads the prompts. What is padding is noted too, and overwritten before it is looked at."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    hidden, cache = model.decode(tokens, model.init_cache(batch, room), positions)
    last = hidden[jnp.arange(batch), lengths - 1]
    return Decoding(cache, model.logits(last), lengths, jnp.zeros(batch, bool), keys)


def _continue(
    model: "Transformer", decoding: Decoding, choice: Choice, count: int, filtered: bool
) -> tuple[Decoding, Array]:
    """Up to `count` more tokens, (batch, count); the stop token fills up where there are fewer."""
    batch = decoding.position.shape[0]
    tokens = jnp.full((batch, count), jnp.maximum(choice.stop_token, 0), jnp.int32)

    def more(carry: tuple[Array, Decoding, Array]) -> Array:
        i, decoding, _ = carry
        return (i < count) & ~decoding.done.all()

    def step(carry: tuple[Array, Decoding, Array]) -> tuple[Array, Decoding, Array]:
        i, now, tokens = carry
        keys = jax.vmap(jax.random.fold_in)(now.key, now.position)
        token = jnp.where(now.done, choice.stop_token, pick(now.logits, keys, choice, filtered))
        hidden, cache = model.decode(token[:, None], now.cache, now.position[:, None])
        done = now.done | (token == choice.stop_token)
        now = Decoding(cache, model.logits(hidden[:, 0]), now.position + 1, done, now.key)
        return i + 1, now, tokens.at[:, i].set(token)

    _, decoding, tokens = jax.lax.while_loop(more, step, (jnp.int32(0), decoding, tokens))
    return decoding, tokens


def pick(
    logits: Float[Array, "batch vocab"], keys: Array, choice: Choice, filtered: bool
) -> Int[Array, " batch"]:
    """The next token of each sequence; `filtered` is whether top_k or top_p count."""
    likeliest = logits.argmax(axis=-1)
    scaled = logits / jnp.where(choice.temperature > 0, choice.temperature, 1.0)
    if filtered:
        descending = jnp.sort(scaled, axis=-1, descending=True)
        rank = jnp.arange(logits.shape[-1])[None]
        stays = rank < choice.top_k
        probability = jax.nn.softmax(jnp.where(stays, descending, -jnp.inf))
        # A token stays if those before it do not reach top_p yet: the likeliest one always does.
        stays &= jnp.cumsum(probability, axis=-1) - probability < choice.top_p
        least = jnp.where(stays, descending, jnp.inf).min(axis=-1, keepdims=True)
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    sampled = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(choice.temperature > 0, sampled, likeliest).astype(jnp.int32)


def _unrolled(model: "Transformer") -> "Transformer":
    """For inference, its layers one by one: a scan would copy each layer's weights per token."""
    model.eval()
    if not isinstance(model.trunk.layers.blocks, nnx.List):
        model.trunk.layers = unstacked(model.trunk.layers)
    return model


@partial(jax.jit, static_argnames=("new", "filtered", "room"))
def _generate(
    model: "Transformer",
    tokens: Array,
    lengths: Array,
    keys: Array,
    choice: Choice,
    new: int,
    filtered: bool,
    room: int,
) -> Array:
    model = _unrolled(model)
    decoding = _prefill(model, tokens, lengths, keys, room)
    return _continue(model, decoding, choice, new, filtered)[1]


@partial(jax.jit, static_argnames="room")
def _begin(model: "Transformer", tokens: Array, lengths: Array, keys: Array, room: int) -> Decoding:
    return _prefill(_unrolled(model), tokens, lengths, keys, room)


@partial(jax.jit, static_argnames=("count", "filtered"), donate_argnames="decoding")
def _go_on(
    model: "Transformer", decoding: Decoding, choice: Choice, count: int, filtered: bool
) -> tuple[Decoding, Array]:
    return _continue(_unrolled(model), decoding, choice, count, filtered)
