"""The fingerprint of a checkpoint: the sum of all bits, on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rezero_jax.runs.restore import fingerprint
from rezero_jax.training.sharding import place_devices

SPECS = {
    "step": P(),
    "bias": P(),
    "stacked": P(None, "data", "model"),
    "rows": P("data", "model"),
    "columns": P(None, "model"),
    "half": P("data"),
}


def numbers():
    rng = np.random.default_rng(0)
    return {
        "step": np.int32(-7),
        "bias": rng.normal(size=7).astype(np.float32),
        "stacked": rng.normal(size=(16, 64, 6)).astype(np.float32),
        "rows": rng.normal(size=(96, 4)).astype(np.float32),
        "columns": rng.normal(size=(33, 8)).astype(np.float32),
        "half": rng.normal(size=(12, 8)).astype(jnp.bfloat16),
    }


def bit_sum(array):
    """The sum in Python's integers."""
    bits = np.atleast_1d(array).view(f"uint{8 * array.dtype.itemsize}")
    return sum(map(int, bits.ravel())) % 2**32


@pytest.mark.devices(8)
def test_it_is_the_sum_of_all_bits_however_the_arrays_are_sharded():
    """So that any flipped bit changes it."""
    mesh = place_devices(jax.devices(), 4, 2)
    state = {
        name: jax.device_put(array, NamedSharding(mesh, SPECS[name]))
        for name, array in numbers().items()
    }
    expected = {name: bit_sum(array) for name, array in numbers().items()}
    assert fingerprint(state) == expected
    assert fingerprint(jax.tree.map(jnp.asarray, numbers())) == expected
