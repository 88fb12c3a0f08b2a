"""BatchNorm: its formulas, gradient and precision, and statistics of a sharded batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.training.sharding import place_devices

RNG = np.random.default_rng(0)


def make(features=5):
    norm = BatchNorm(features)
    norm.scale[...] = jnp.asarray(RNG.uniform(0.5, 1.5, features), jnp.float32)
    norm.bias[...] = jnp.asarray(RNG.normal(size=features), jnp.float32)
    return norm


def images(shape=(6, 4, 4, 5), *, mean=0.0):
    return jnp.asarray(RNG.normal(mean, 2.0, shape), jnp.float32)


def formula(norm, x, mean, var):
    scale, bias = (np.asarray(p[...], np.float64) for p in (norm.scale, norm.bias))
    return scale * (np.asarray(x, np.float64) - mean) / np.sqrt(var + 1e-5) + bias


def test_training_normalises_by_the_batch_and_moves_the_running_statistics():
    norm = make()
    mean, var = np.zeros(5), np.ones(5)
    for _ in range(3):
        x = images(mean=3.0)
        exact = np.asarray(x, np.float64).reshape(-1, 5)
        np.testing.assert_allclose(
            norm(x), formula(norm, x, exact.mean(0), exact.var(0)), rtol=1e-5, atol=1e-5
        )
        mean = 0.9 * mean + 0.1 * exact.mean(0)
        var = 0.9 * var + 0.1 * exact.var(0, ddof=1)
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
        np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    norm = make()
    norm(images(mean=3.0))
    kept = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
    norm.eval()
    x = images()
    np.testing.assert_allclose(norm(x), formula(norm, x, *kept), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], kept[0])
    np.testing.assert_array_equal(norm.var[...], kept[1])
    norm.train()
    norm(x)
    assert not np.array_equal(norm.mean[...], kept[0])


def test_precise_for_a_mean_that_is_large_against_the_spread_once_it_is_known():
    """A plain sum of squares would lose every digit: 1e4^2 against 1."""
    norm = BatchNorm(5)
    x = jnp.asarray(1e4 + RNG.normal(size=(512, 5)), jnp.float32)
    for _ in range(100):
        y = norm(x)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=2e-3)


def test_a_batch_of_one_pixel_is_its_own_mean():
    norm = make()
    x = images((1, 1, 1, 5))
    # The variance is 0, so rounding in x is multiplied by 1 / sqrt(1e-5) = 316.
    np.testing.assert_allclose(norm(x).ravel(), norm.bias[...], atol=316 * 6e-7)
    assert np.isfinite(norm.var[...]).all()


@pytest.mark.devices(4)
def test_statistics_cover_the_whole_batch_on_several_devices():
    mesh = place_devices(jax.devices(), 4, 1)
    x = images((8, 4, 4, 5)) + jnp.arange(8.0).reshape(8, 1, 1, 1)  # devices hold different means
    graphdef, state = nnx.split(make())

    @jax.jit
    def run(state, x):
        norm = nnx.merge(graphdef, state)
        return norm(x), norm.mean[...], norm.var[...]

    whole = run(state, x)
    shared = run(state, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert len(shared[0].sharding.device_set) == 4
    for a, b in zip(whole, shared, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
