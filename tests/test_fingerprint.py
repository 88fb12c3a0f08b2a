"""The fingerprint of a checkpoint: the sum of all bits, on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rezero_jax.config import base_config
from rezero_jax.runs.checkpoint import Checkpoints
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


@pytest.fixture
def state():
    mesh = place_devices(jax.devices(), 4, 2)
    return {
        name: jax.device_put(array, NamedSharding(mesh, SPECS[name]))
        for name, array in numbers().items()
    }


def test_it_is_the_sum_of_all_bits_however_the_arrays_are_sharded(state):
    expected = {name: bit_sum(array) for name, array in numbers().items()}
    assert fingerprint(state) == expected
    assert fingerprint(jax.tree.map(jnp.asarray, numbers())) == expected


@pytest.mark.parametrize("name", SPECS)
def test_any_flipped_bit_changes_it(name, state):
    before = fingerprint(state)[name]
    array = np.atleast_1d(np.asarray(state[name])).copy()
    data = array.view(np.uint8).reshape(-1)
    for at in range(0, len(data), max(len(data) // 5, 1)):
        data[at] ^= 1 << at % 8
        assert fingerprint({name: jnp.asarray(array)})[name] != before
        data[at] ^= 1 << at % 8


def test_arrays_are_saved_without_compressing_them(tmp_path):
    """Compressed zeros would take almost no space."""
    array = jnp.zeros((64, 1024))
    checkpoints = Checkpoints(tmp_path / "checkpoints", base_config().checkpoint)
    checkpoints.save(1, {"w": array}, {}, None)
    checkpoints.close()
    files = [path for path in (tmp_path / "checkpoints" / "1").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > array.nbytes
