"""Dropout by keys of the hardware's generator, and by JAX's default ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax.devices import Target
from rezero_jax.models import dropout
from rezero_jax.models.dropout import LEVELS, Dropout
from rezero_jax.training.sharding import place_devices

X = jnp.ones((8, 16, 1024))
MEAN = 4 * (0.25 / 0.75 / X.size) ** 0.5  # four standard deviations of the mean of X after it


def dropped(key, x=X, rate=0.25):
    return Dropout(rate)(x, rngs=nnx.Rngs(dropout=key))


def on_mesh(data, key):
    with jax.set_mesh(place_devices(jax.devices(), data, 1)):
        return np.asarray(jax.jit(dropped)(key))


@pytest.mark.devices(4)
def test_default_keys_give_what_flax_gives():
    key = jax.random.key(3)
    expected = nnx.Dropout(0.25)(X, rngs=nnx.Rngs(dropout=nnx.Rngs(dropout=key).dropout()))
    np.testing.assert_array_equal(dropped(key), expected)
    np.testing.assert_array_equal(on_mesh(4, key), expected)


@pytest.mark.devices(4)
@pytest.mark.parametrize("data", [1, 4])
def test_the_hardwares_bits_drop_as_many_and_keep_the_mean(data):
    key = jax.random.key(3, impl="rbg")
    y = on_mesh(data, key)
    level = LEVELS / (LEVELS - round(0.25 * LEVELS))
    assert set(np.unique(y)) == {0, np.float32(level)}
    assert abs(y.mean() - 1) < MEAN
    assert abs(np.mean(y == 0) - 0.25) < MEAN
    # A function of the key alone, and each example and each device has bits of its own.
    np.testing.assert_array_equal(y, on_mesh(data, key))
    assert not np.array_equal(y, on_mesh(data, jax.random.key(4, impl="rbg")))
    assert len({row.tobytes() for row in y}) == len(y)
    np.testing.assert_array_equal(jax.grad(lambda x: dropped(key, x).sum())(X), dropped(key))


def test_on_a_gpu_it_hashes_and_keeps_the_mean(monkeypatch):
    """Each key, example and position has bits of its own, and the gradient is where it keeps."""
    monkeypatch.setattr(dropout, "target", lambda: Target("gpu", ""))
    keys = jax.random.split(jax.random.key(3), 16)
    y = np.asarray(jax.vmap(dropped)(keys))
    assert set(np.unique(y)) == {0, np.float32(4 / 3)}
    kept = (y > 0).reshape(16, 8, -1) - 0.75
    assert abs(kept.mean()) < MEAN
    sides = kept.reshape(128, -1) / (0.25 * 0.75) ** 0.5
    correlations = sides @ sides.T / sides.shape[1]
    assert np.abs(correlations - np.eye(128)).max() < 6 / sides.shape[1] ** 0.5
    for step in (1, 2, 3, 512, 1024):
        assert abs((sides[:, step:] * sides[:, :-step]).mean()) < 5 / sides.size**0.5
    gradient = jax.grad(lambda x: dropped(keys[0], x).sum())(X)
    np.testing.assert_array_equal(gradient, y[0])
    saved = jax.vjp(lambda x: dropped(keys[0], x), X)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(saved)) < 16  # no mask is kept


@pytest.mark.devices(4)
def test_each_device_draws_its_own_bits_and_nothing_travels():
    key = jax.random.key(0, impl="rbg")
    with jax.set_mesh(place_devices(jax.devices(), 4, 1)):
        rows = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P("data"))
        x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=rows)
        text = jax.jit(dropped).lower(key, x).compile().as_text()
    assert "all-" not in text
    assert "[8,16,1024]" not in text  # the whole batch


def test_without_dropout_nothing_changes():
    layer = Dropout(0.5)
    layer.eval()
    for impl in ("rbg", "threefry2x32"):
        rngs = nnx.Rngs(dropout=jax.random.key(0, impl=impl))
        for one in (Dropout(0.0), Dropout(1e-9), layer):
            np.testing.assert_array_equal(one(X, rngs=rngs), X)
