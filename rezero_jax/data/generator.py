"""Random numbers that a key alone decides, in integer arithmetic that no library can change."""

import numpy as np

from rezero_jax.errors import choose_from

METHODS = ("hash", "numpy")  # of config.data.order

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class SplitMix64:
    """SplitMix64 (Steele, Lea and Flood 2014), started at a hash of its key.

    The methods are those of np.random.Generator, whose numbers may change with NumPy's version.

    Args:
      key: integers in 0 .. 2**64 - 1, such as a seed and the number of an epoch.
    """

    def __init__(self, *key: int):
        self._state = np.zeros(1, np.uint64)  # an array, as scalars warn when they overflow
        for number in key:
            self._state = _mix(self._state + _GAMMA + np.uint64(number))

    def bits(self, count: int) -> np.ndarray:
        """The next `count` (at least 1) outputs, uint64 (count,)."""
        states = self._state + _GAMMA * np.arange(1, count + 1, dtype=np.uint64)
        self._state = states[-1:]
        return _mix(states)

    def permutation(self, size: int) -> np.ndarray:
        """0 .. size - 1 in random order, int64 (size,)."""
        return np.argsort(self.bits(size), kind="stable")

    def integers(self, high: int, size: int) -> np.ndarray:
        """Uniform in 0 .. high - 1, to within high / 2**64; int64 (size,)."""
        return (self.bits(size) % np.uint64(high)).astype(np.int64)

    def uniform(self, low: float, high: float) -> float:
        """Uniform in low .. high, from 53 bits."""
        return low + (high - low) * (float(self.bits(1)[0] >> np.uint64(11)) * 2.0**-53)


Generator = SplitMix64 | np.random.Generator


def generator(method: str, *key: int) -> Generator:
    """The random numbers of `key` by one of METHODS; raises UserError for another method."""
    if method not in METHODS:
        raise choose_from("data.order", method, METHODS)
    return SplitMix64(*key) if method == "hash" else np.random.default_rng(list(key))


def _mix(state: np.ndarray) -> np.ndarray:
    """The output of SplitMix64 for each state: a bijection of uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
