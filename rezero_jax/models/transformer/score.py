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
    the first window is predicted from at least max_len / 2 bytes before it. Call model.eval().

    Raises:
      UserError: the text has fewer than two bytes, or a byte that the vocabulary lacks.
    """
    if len(text) < 2:
        raise UserError(
            f"a text of {len(text)} byte(s) has nothing to predict; give at least two bytes"
        )
    data = np.frombuffer(text, np.uint8).astype(np.int32)
    if data.max() >= model.vocab_size:
        known = f"and the model knows tokens below {model.vocab_size}"
        raise UserError(f"the text has the byte {data.max()}, {known}; give another text")
    length, step = model.max_len, max(model.max_len // 2, 1)
    end = max(len(data) - 1 - (length - step), 1)  # of the starts of windows
    total = 0.0
    for first in range(0, end, AT_ONCE * step):
        start = first + step * np.arange(AT_ONCE)[:, None]
        position = start + np.arange(length)
        tokens, targets = (data.take(position + shift, mode="clip") for shift in (0, 1))
        # Neither the targets of the window before, nor any beyond the text.
        is_new = (start == 0) | (position >= start + length - step)
        targets = np.where(is_new & (position < len(data) - 1), targets, IGNORED)
        total += float(_loss(model, jnp.asarray(tokens), jnp.asarray(targets)))
    return total / (len(data) - 1) / math.log(2)


@jax.jit
def _loss(model: Transformer, tokens: Array, targets: Array) -> Array:
    return nnx.clone(model).losses(tokens, targets).sum()
