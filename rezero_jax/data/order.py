"""Which examples make up a batch: a pure function of the seed and the number of the update."""

import dataclasses
import functools

import numpy as np

from rezero_jax.data.generator import generator
from rezero_jax.errors import UserError


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(method: str, seed: int, size: int, epoch: int) -> np.ndarray:
    """The order of the examples in one epoch, int32 (size,), read-only."""
    order = generator(method, seed, epoch).permutation(size).astype(np.int32)
    order.flags.writeable = False
    return order


@dataclasses.dataclass(frozen=True)
class Order:
    """The endless stream of shuffled epochs, cut into batches.

    Epoch e is a permutation drawn from (seed, e); the epochs are laid end to end and update t takes
    positions t * batch_size onwards. Each epoch therefore visits every example exactly once: where
    batch_size does not divide size, a batch holds the end of one epoch and the start of the next.
    There is no state, so any update can be asked for at any time.

    Attributes:
      method: how permutations are drawn, see generator.METHODS.

    Raises:
      UserError: the method is unknown, the seed is negative, or the batch is empty or larger than
          the data set.
    """

    seed: int
    size: int
    batch_size: int
    method: str = "hash"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative; set it to 0 or more")
        generator(self.method, self.seed)  # refuses an unknown method
        if self.batch_size < 1:
            raise UserError(f"train.batch_size={self.batch_size} is empty; set it to at least 1")
        if self.batch_size > self.size:
            raise UserError(
                f"train.batch_size={self.batch_size} is larger than the {self.size} training "
                f"examples; lower it to at most {self.size}"
            )

    def indices(self, step: int) -> np.ndarray:
        """The examples of update number `step` (0 is the first), int32 (batch_size,)."""
        epoch, start = divmod(int(step) * self.batch_size, self.size)
        permutation = functools.partial(_permutation, self.method, self.seed, self.size)
        batch = permutation(epoch)[start : start + self.batch_size]
        missing = self.batch_size - len(batch)
        if missing:
            return np.concatenate([batch, permutation(epoch + 1)[:missing]])
        return batch.copy()


def eval_batches(
    size: int, batch_size: int, examples: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every example once, or the first `examples` of them, in order, in batches of one shape.

    Returns:
      indices, int32 (batches, batch_size), and mask, bool of the same shape. The mask is False
      where the last batch is filled up; those places hold index 0.

    Raises:
      UserError: batch_size or examples is below 1.
    """
    if batch_size < 1:
        raise UserError(f"the evaluation batch size {batch_size} is empty; set it to at least 1")
    if examples is not None:
        if examples < 1:
            raise UserError(f"eval.examples={examples} evaluates nothing; set it to at least 1")
        size = min(size, examples)
    batches = -(-size // batch_size)
    positions = np.arange(batches * batch_size, dtype=np.int32).reshape(batches, batch_size)
    mask = positions < size
    return np.where(mask, positions, np.int32(0)), mask
