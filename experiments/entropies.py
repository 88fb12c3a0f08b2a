"""The n-gram entropies of the text that runs were trained on, for the plots of language models."""

from functools import cache

import numpy as np
from etils import epath
from jaxtyping import UInt8
from scipy import stats

from rezero_jax.data.text import TEXT_NAMES, read_text
from rezero_jax.runs.folder import recorded_config


@cache
def of_run(folder: epath.Path) -> dict[str, float]:
    """Unigram, bigram and trigram entropy (bits per byte) of a run's text; empty without a text."""
    config = recorded_config(folder).data
    return of_text(read_text(config)[0]) if config.name in TEXT_NAMES else {}


def of_text(text: UInt8[np.ndarray, " bytes"]) -> dict[str, float]:
    """Bits per byte of a byte given the 0, 1 or 2 bytes before it, by frequencies in this text.

    That is H(n bytes) - H(n - 1 bytes), over the windows of n bytes.
    """
    entropies = {}
    codes = np.zeros(len(text) + 1, np.int32)
    for n, name in enumerate(("unigram", "bigram", "trigram")):
        codes = (codes[:-1] << 8) | text[n:]
        entropies[name] = _entropy(codes) - _entropy(codes >> 8)
    return entropies


def _entropy(codes: np.ndarray) -> float:
    return float(stats.entropy(np.unique(codes, return_counts=True)[1], base=2))
