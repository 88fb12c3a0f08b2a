"""BatchNorm: its formulas, running statistics and precision."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rezero_jax.models.resnet.batch_norm import BatchNorm

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


def test_training_normalises_by_the_batch_and_evaluation_by_the_running_statistics():
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
    view = nnx.view(norm, use_running_average=True)
    assert not norm.use_running_average
    norm.eval()
    kept, x = np.asarray(norm.mean[...]), images()
    for one in (norm, view):
        np.testing.assert_allclose(one(x), formula(norm, x, mean, var), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], kept)


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
