"""Entropies of a text: what a model of single bytes, pairs or triples can reach at best on it."""

import numpy as np
from jaxtyping import UInt8

from rezero_jax.errors import UserError

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}


def ngram_entropy(text: UInt8[np.ndarray, " bytes"], n: int) -> float:
    """Bits per byte of a byte given the n - 1 before it, by their frequencies in this text.

    That is H(n bytes) - H(n - 1 bytes), of the windows of n bytes. A table of these frequencies
    predicts this very text so well, and another text worse: the more so the larger n and the
    shorter the text.

    Args:
      n: 1, 2 or 3.

    Raises:
      UserError: n is another number, or the text is shorter than n bytes.
    """
    if n not in NAMES:
        raise UserError(f"n={n} is not 1, 2 or 3; choose one of them")
    windows = len(text) - n + 1
    if windows < 1:
        raise UserError(f"a text of {len(text)} bytes has no {n} in a row; give a longer one")
    codes = np.zeros(windows, np.int32)
    for offset in range(n):
        codes = (codes << 8) | text[offset : offset + windows]
    return _entropy(codes) - (_entropy(codes >> 8) if n > 1 else 0.0)


def ngram_entropies(text: UInt8[np.ndarray, " bytes"]) -> dict[str, float]:
    """`ngram_entropy` of one, two and three bytes: "unigram" -> bits per byte, ..."""
    return {name: ngram_entropy(text, n) for n, name in NAMES.items()}


def _entropy(codes: np.ndarray) -> float:
    """Bits of the empirical distribution of non-negative integers."""
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-(shares * np.log2(shares)).sum())
