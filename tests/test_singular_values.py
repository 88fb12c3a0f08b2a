"""Singular values of Jacobians, on networks whose Jacobian is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import spectra
from rezero_jax.analysis import singular_values as module
from rezero_jax.analysis.singular_values import (
    jacobian,
    mean_squared_singular_value,
    safe_norms,
    singular_values,
)
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.resnet.config import CifarConfig

KEY = jax.random.key(0)


class Linear(nnx.Module):
    """x -> W x, a row of x an example."""

    def __init__(self, matrix):
        self.matrix = nnx.Param(jnp.asarray(matrix))

    def __call__(self, x):
        return x @ self.matrix[...].T


def normal(*shape, seed=1):
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def with_values(values, outputs, inputs, seed=1):
    """A float64 matrix (outputs, inputs) with these singular values."""
    middle = np.zeros((outputs, inputs))
    np.fill_diagonal(middle, values)
    left = np.linalg.qr(np.float64(normal(outputs, outputs, seed=2 * seed)))[0]
    return left @ middle @ np.linalg.qr(np.float64(normal(inputs, inputs, seed=2 * seed + 1)))[0]


@pytest.mark.parametrize("wide", [True, False])  # fewer rows than columns, or more
def test_the_jacobian_is_computed_by_rows_or_by_columns(wide):
    rows, columns = (3, 7) if wide else (7, 3)
    a, b = normal(5, columns, seed=1), normal(rows, 5, seed=2)
    network = nnx.Sequential(Linear(a), Linear(b))
    np.testing.assert_allclose(jacobian(network, jnp.ones(columns)), b @ a, rtol=2e-6, atol=1e-6)
    expected = np.linalg.svd(np.float64(b) @ a, compute_uv=False)
    for values in singular_values(network, normal(2, columns)):
        np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_float64_resolves_what_float32_cannot():
    values = [1, 1e-5, 1e-12]
    matrix = with_values(values, 3, 3)
    assert singular_values(Linear(np.float32(matrix)), normal(1, 3))[0, 2] > 1e-10
    with jax.enable_x64(True):
        (found,) = singular_values(Linear(matrix), np.ones((1, 3)))
    np.testing.assert_allclose(found, values, rtol=1e-3)


def test_a_model_is_not_written_to_and_a_second_one_compiles_nothing():
    x = normal(2, 3, 3, 2)
    convs = [CifarConfig().conv(2, 1, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    models = [nnx.Sequential(conv, BatchNorm(1)) for conv in convs]
    before = [np.array(leaf) for leaf in jax.tree.leaves(models[0])]  # in training mode, too
    values = [singular_values(models[0], x)]
    size = module._jacobian._cache_size()
    values.append(singular_values(models[1], x))
    assert module._jacobian._cache_size() == size
    assert not np.array_equal(*values)
    for leaf, old in zip(jax.tree.leaves(models[0]), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_probes_have_the_mean_and_the_variance_of_the_closed_form():
    squares = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.1]) ** 2
    model = Linear(np.float32(with_values(np.sqrt(squares), 9, 6)))
    found = mean_squared_singular_value(model, normal(1, 6), probes=4000, key=KEY)
    # For u uniform on the sphere of radius sqrt(m), Var(u^T A u) = 2 (m tr A^2 - tr^2 A) / (m + 2).
    m = 9
    variance = 2 * (m * (squares**2).sum() - squares.sum() ** 2) / (m + 2)
    assert found.standard_error == pytest.approx(np.sqrt(variance / 4000) / 6, rel=0.05)
    assert abs(found.mean - squares.mean()) < 3 * found.standard_error


def test_norms_neither_overflow_nor_underflow():
    for factor in (1e-30, 1.0, 1e30):
        x = np.float32(factor) * np.float32([[3, 4], [0, 0]])
        np.testing.assert_allclose(safe_norms(x), [5 * np.float32(factor), 0], rtol=1e-6)
    infinite, unknown = safe_norms(jnp.array([[1, jnp.inf], [jnp.nan, 1]]))
    assert np.isinf(infinite)
    assert np.isnan(unknown)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "depth", "notebook"),
    [
        ("post-norm", 12, 0.810),
        ("pre-norm", 12, 10.242),
        ("ReZero", 12, 1.059),
        ("pre-norm", 128, 66.281),
        ("ReZero", 128, 2.142),
    ],
)
def test_transformers_at_initialisation_have_the_notebooks_mean(rule, depth, notebook):
    """10 networks with an input each: the notebook's number lies among such means of ours."""
    tens = np.reshape(spectra.mean_squares(rule, depth, 300), (30, 10)).mean(axis=1)
    low, high = np.quantile(tens, (0.025, 0.975))
    assert low < notebook < high
