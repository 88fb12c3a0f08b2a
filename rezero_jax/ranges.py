"""The values that the fields of a config may have, checked before anything is made."""

import fnmatch
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from rezero_jax.errors import UserError
from rezero_jax.fields import flatten

LARGEST = 2**31 - 1  # JAX counts in int32
MOST_DEVICES = 1024  # with more, a CPU that poses as them takes minutes to start


class Range(NamedTuple):
    """The numbers from `low` to `high`, which is one of them unless `is_open`."""

    low: float
    high: float
    is_open: bool = False

    def has(self, value: float) -> bool:
        """Whether it is one of them."""
        return self.low <= value < self.high or (value == self.high and not self.is_open)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low}"
        return f"{self.low} to {'below ' if self.is_open else ''}{self.high}"


FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, is_open=True)
NOT_NEGATIVE = Range(0, math.inf)

# The first pattern that fits a field counts. Bounds that depend on other fields, and those of
# lengths and batches, are checked where these are used.
RANGES = {
    "seed": Range(0, 2**32 - 1),  # a larger one gives JAX the same key as a smaller one
    "mesh.cpu_devices": Range(1, MOST_DEVICES),
    "mesh.data": Range(-1, LARGEST),
    "mesh.model": Range(1, LARGEST),
    "model.dropout": BELOW_ONE,
    "model.depth": Range(0, 10**6),
    "model.width": Range(0, 10**6),
    "model.heads": Range(1, 10**6),
    "model.kv_heads": Range(1, 10**6),
    "model.feedforward": Range(1, 10**7),
    "model.vocab_size": Range(1, 10**7),
    "model.max_len": Range(1, 10**7),
    "model.weight_variance": NOT_NEGATIVE,
    "data.image_size": Range(1, 10**4),
    "data.crop_padding": Range(0, 10**4),
    "data.jitter": FRACTION,
    "data.rotation": Range(0, 360),
    "data.length": Range(1, 10**7),
    "data.context": Range(0, 10**7),
    "eval.examples": Range(1, LARGEST),
    "optim.b1": BELOW_ONE,
    "optim.b2": BELOW_ONE,
    "optim.momentum": BELOW_ONE,
    "checkpoint.keep_best": Range(0, LARGEST),
    "*.weight_decay": NOT_NEGATIVE,
    "*.decay_factor": NOT_NEGATIVE,
}


def check_ranges(config: ConfigDict) -> None:
    """Checks every number of a config by itself.

    Raises:
      UserError: one is out of its range, not finite, or larger than JAX can count.
    """
    for key, value in flatten(config.to_dict()).items():
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check(key, number)


def _check(key: str, number: float) -> None:
    if not math.isfinite(number):
        raise UserError(f"{key}={number} is not finite; give a finite number")
    known = (valid for pattern, valid in RANGES.items() if fnmatch.fnmatchcase(key, pattern))
    valid = next(known, Range(-math.inf, LARGEST) if isinstance(number, int) else None)
    if valid is None or valid.has(number):
        return
    if number > valid.high:
        raise UserError(f"{key}={number} is too large; give at most {valid.high}")
    what = "negative" if number < 0 <= valid.low else "out of range"
    raise UserError(f"{key}={number} is {what}; give {valid}")
