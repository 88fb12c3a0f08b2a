"""Bits per byte of a text under a language model, whatever the length of either."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from rezero_jax.errors import UserError
from rezero_jax.models.transformer.model import IGNORED, Transformer

AT_ONCE = 16  # windows in a batch


def bits_per_byte(model: Transformer, text: bytes) -> float:
    """The mean cross entropy, in bits, of every byte of `text` after the first.

    The text is read in windows of `max_len` bytes that overlap by a half, so that each byte beyond
    the first window is predicted from at least max_len / 2 bytes before it. The model should be in
    evaluation mode.

    Raises:
      UserError: the text has fewer than two bytes, or a byte that the vocabulary lacks.
    """
    if len(text) < 2:
        raise UserError(f"a text of {len(text)} bytes predicts nothing; give at least two bytes")
    data = np.frombuffer(text, np.uint8).astype(np.int32)
    if data.max() >= model.vocab_size:
        raise UserError(
            f"the text has the byte {data.max()}, and the model knows tokens below "
            f"{model.vocab_size}; give another text"
        )
    length, step = model.max_len, max(model.max_len // 2, 1)
    starts = range(0, max(len(data) - 1 - (length - step), 1), step)
    total = 0.0
    for first in range(0, len(starts), AT_ONCE):
        batch = [_window(data, start, length, step) for start in starts[first : first + AT_ONCE]]
        padding = np.stack([np.zeros(length, np.int32), np.full(length, IGNORED)])
        batch += [padding] * (AT_ONCE - len(batch))
        tokens, targets = np.stack(batch, axis=1)
        total += float(_loss(model, jnp.asarray(tokens), jnp.asarray(targets)))
    return total / (len(data) - 1) / math.log(2)


def _window(data: np.ndarray, start: int, length: int, step: int) -> np.ndarray:
    """Tokens and targets (2, length) from `start`; targets that were scored before are ignored."""
    tokens, targets = np.zeros(length, np.int32), np.full(length, IGNORED)
    given, wanted = data[start : start + length], data[start + 1 : start + length + 1]
    tokens[: len(given)], targets[: len(wanted)] = given, wanted
    if start:
        targets[: length - step] = IGNORED
    return np.stack([tokens, targets])


@jax.jit
def _loss(model: Transformer, tokens: Array, targets: Array) -> Array:
    return nnx.clone(model).losses(tokens, targets).sum()
