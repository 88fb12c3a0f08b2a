"""The examples of a batch, as a pure function of the seed and the number of the update."""

import dataclasses
import functools
import math

import numpy as np

from rezero_jax.errors import UserError, check_between

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class SplitMix64:
    """SplitMix64 (Steele, Lea and Flood 2014), seeded by a hash of a key.

    The key consists of integers in 0 .. 2**64 - 1, such as a seed and the number of an epoch. The
    numbers are the same in every version, unlike those of np.random.Generator, because a resumed
    run must see the same batches.
    """

    def __init__(self, *key: int):
        self._state = np.zeros(1, np.uint64)  # an array, because scalars warn about overflow
        for number in key:
            self._state = _mix(self._state + _GAMMA + np.uint64(number))

    def bits(self, count: int) -> np.ndarray:
        """The next `count` (at least 1) outputs, uint64 (count,)."""
        states = self._state + _GAMMA * np.arange(1, count + 1, dtype=np.uint64)
        self._state = states[-1:]
        return _mix(states)

    def integers(self, high: int, size: int) -> np.ndarray:
        """Uniform integers in 0 .. high - 1, to within high / 2**64; int64 (size,)."""
        return (self.bits(size) % np.uint64(high)).astype(np.int64)

    def uniform(self, low: float, high: float) -> float:
        """A uniform number in low .. high, from 53 bits."""
        return low + (high - low) * (float(self.bits(1)[0] >> np.uint64(11)) * 2.0**-53)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, size: int, epoch: int) -> np.ndarray:
    """The order of the examples in one epoch, int32 (size,); callers must not modify the array."""
    return np.argsort(SplitMix64(seed, epoch).bits(size), kind="stable").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Order:
    """The endless stream of shuffled epochs, divided into batches.

    Epoch e is a permutation drawn from (seed, e). A batch may straddle two epochs. There is no
    state, so the batch of any update is available at any time. A UserError is raised for a seed or
    a batch size that is out of range.
    """

    seed: int
    size: int
    batch_size: int

    def __post_init__(self) -> None:
        check_between(0, self.seed, 2**32 - 1, "seed")  # JAX would truncate a larger seed
        if not 1 <= self.batch_size <= self.size:
            raise UserError(
                f"train.batch_size={self.batch_size} is empty or larger than the {self.size} "
                f"training examples; set it to 1 .. {self.size}"
            )

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step` (from 0), int32 (batch_size,)."""
        epoch, start = divmod(int(step) * self.batch_size, self.size)
        batch = _permutation(self.seed, self.size, epoch)[start : start + self.batch_size]
        if missing := self.batch_size - len(batch):
            following = _permutation(self.seed, self.size, epoch + 1)
            return np.concatenate([batch, following[:missing]])
        return batch.copy()


def eval_batches(
    size: int, batch_size: int, examples: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divides all examples, or the first `examples`, into batches of one shape, in order.

    Returns:
      indices, int32 (batches, batch_size), and mask, bool, False where 0 pads the last batch.

    Raises a UserError if batch_size is not in 1 .. 1,000,000, or examples is below 1.
    """
    check_between(1, batch_size, 1_000_000, "eval.batch_size")
    check_between(1, examples, math.inf, "eval.examples")
    size = min(size, examples or size)
    batches = -(-size // batch_size)
    positions = np.arange(batches * batch_size, dtype=np.int32).reshape(batches, batch_size)
    mask = positions < size
    return np.where(mask, positions, np.int32(0)), mask
