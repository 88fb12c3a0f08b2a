"""The valid values of the fields of a config, checked before anything is made."""

import fnmatch
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from rezero_jax.errors import UserError
from rezero_jax.fields import flatten

LARGEST = 2**31 - 1  # JAX counts in int32
MOST_DEVICES = 1024  # as which a CPU poses; more take minutes to start


class Range(NamedTuple):
    """The numbers from `low` to `high`, which is excluded if `is_open`."""

    low: float
    high: float
    is_open: bool = False


FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, is_open=True)
NOT_NEGATIVE = Range(0, math.inf)

# The first pattern that matches a field counts. Bounds that depend on other fields, and those of
# lengths and batches, are checked where they are used.
RANGES = {
    "seed": Range(0, 2**32 - 1),  # a larger one gives JAX the same key as a smaller one
    "mesh.cpu_devices": Range(1, MOST_DEVICES),
    "mesh.data": Range(-1, LARGEST),
    "mesh.model": Range(1, LARGEST),
    "model.dropout": BELOW_ONE,
    "model.depth": Range(0, 10**6),
    "model.base_depth": Range(1, 10**6),
    "model.width": Range(0, 10**6),
    "model.heads": Range(1, 10**6),
    "model.kv_heads": Range(1, 10**6),
    "model.feedforward": Range(1, 10**7),
    "model.vocab_size": Range(1, 10**7),
    "model.max_len": Range(1, 10**7),
    "model.patch": Range(1, 10**4),
    "model.weight_variance": NOT_NEGATIVE,
    "data.workers": Range(0, 1024),
    "data.image_size": Range(1, 10**4),
    "data.crop_padding": Range(0, 10**4),
    "data.jitter": FRACTION,
    "data.rotation": Range(0, 360),
    "data.length": Range(1, 10**7),
    "data.context": Range(0, 10**7),
    "eval.examples": Range(1, LARGEST),
    "train.until_loss": NOT_NEGATIVE,
    "optim.b1": BELOW_ONE,
    "optim.b2": BELOW_ONE,
    "optim.momentum": BELOW_ONE,
    "checkpoint.keep_best": Range(0, LARGEST),
    "*.weight_decay": NOT_NEGATIVE,
    "*.decay_factor": NOT_NEGATIVE,
}


def check_ranges(config: ConfigDict) -> None:
    """Checks each number of a config on its own.

    Raises:
      UserError: a number is out of its range, not finite, or an integer too large for JAX.
    """
    for key, value in flatten(config.to_dict()).items():
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check(key, number)


def _check(key: str, number: float) -> None:
    if not math.isfinite(number):
        raise UserError(f"{key}={number} is not finite; give a finite number")
    known = (valid for pattern, valid in RANGES.items() if fnmatch.fnmatchcase(key, pattern))
    other = Range(-math.inf, LARGEST if isinstance(number, int) else math.inf)
    low, high, is_open = next(known, other)
    if low <= number < high or (number == high and not is_open):
        return
    is_large = number > high
    what = "too large" if is_large else "negative" if number < 0 <= low else "out of range"
    if is_open:
        advice = f"{low} to below {high}"
    elif is_large:
        advice = f"at most {high}"
    else:
        advice = f"at least {low}" if math.isinf(high) else f"{low} to {high}"
    raise UserError(f"{key}={number} is {what}; give {advice}")
