"""E4: Jacobians at initialisation against decompositions, the toy net's rates against algebra."""

import jax
import numpy as np
import pytest

from experiments import initialisation, spectra, toy
from experiments.results import Curve, Results
from rezero_jax.analysis.singular_values import singular_values


def test_nets_are_those_of_the_experiment_on_jacobians():
    """The sum of squares without a decomposition is that of the singular values."""
    found = spectra.mean_squares("ReZero", 2, 2)
    for seed, squares in enumerate(found):
        key = jax.random.key(seed)
        net = spectra.encoder("rezero", 2, key)
        x = jax.random.normal(jax.random.fold_in(key, 1), (1, 4, 16))
        assert squares == pytest.approx((singular_values(net, x) ** 2).mean(), rel=1e-5)


def test_layer_norm_and_uniform_attention_lose_what_algebra_says():
    values = spectra.layer_norm(3)
    # Of each token the mean is lost for good, and the direction of x but for epsilon.
    assert (values < 1e-5).sum() == 3 * 4 + ((values > 1e-7) & (values < 1e-5)).sum()
    assert ((values < 1e-3).sum(1) == 8).all()
    assert ((spectra.attention(3, uniform=True) > 1e-5).sum(1) == 16).all()
    assert ((spectra.attention(3, uniform=False) > 1e-5).sum(1) > 16).all()


def test_means_of_ten():
    means = initialisation.means_of_ten(np.arange(1000))
    assert (np.diff(means) >= 0).all()
    assert means.mean() == pytest.approx(499.5, abs=3)
    assert means.std() == pytest.approx(1000 / np.sqrt(12 * 10), rel=0.03)


def test_the_toy_gradient_is_that_of_its_cost():
    with jax.enable_x64(True):
        for alpha, w in ((0.1, 1.0), (1.0, 0.3), (0.5, -0.2)):
            step = 1e-6
            slopes = [
                (toy.soft_cost(alpha + step, w, 7) - toy.soft_cost(alpha - step, w, 7)),
                (toy.soft_cost(alpha, w + step, 7) - toy.soft_cost(alpha, w - step, 7)),
            ]
            expected = np.array(slopes) / (2 * step)
            np.testing.assert_allclose(toy.soft_gradient(alpha, w, 7), expected, rtol=1e-6)


def test_without_a_gate_the_first_update_sets_the_largest_rate():
    """From w = 1 it may not pass -3: rate L 2^(L-1) mean(x_0) = 4, as the slope of ln cosh is 1."""
    for layers in (20, 30):
        expected = 4 / (layers * 2.0 ** (layers - 1) * 1.4)
        found = toy.largest_stable_rate(layers, gated=False)
        assert found == pytest.approx(expected, rel=0.011)
        assert toy.largest_stable_rate(layers, gated=True) > 100 * found


def claim(setting, means):
    results = Results("initialisation", "paper")
    initialisation.judge_notebook(results, setting, np.sort(np.array(means)), 1000)
    return results.claims[0]


def test_a_number_of_the_notebook_is_judged_by_the_share_of_means_beyond_it():
    """ReZero, 12 layers: 1.059. With m of 1,000 means beyond, the two-sided share is m / 500."""

    def beyond(m):
        return [1.0] * (1000 - m) + [1.1] * m

    name = "ReZero, 12 layers"
    assert [claim(name, beyond(m)).status for m in (500, 25)] == ["replicated"] * 2
    assert [claim(name, beyond(m)).status for m in (24, 5)] == ["not significant"] * 2
    assert [claim(name, beyond(m)).status for m in (4, 0)] == ["contradicted"] * 2
    zero = [claim("post-norm, 128 layers", [0.0] * m + [0.3] * (1000 - m)) for m in (0, 10, 25)]
    assert [found.status for found in zero] == ["contradicted", "not significant", "replicated"]


def test_equation_7_is_judged_by_slopes():
    layers = np.array(initialisation.LAYERS)
    bound, power = 2.0**-layers / layers, 10.0 * layers**-2.0
    for residual, rezero, status in ((bound, power, "replicated"), (power, bound, "contradicted")):
        curves = {"residual": Curve([], residual), "ReZero": Curve([], rezero)}
        results = Results("initialisation", "paper", curves=curves)
        initialisation.judge_equation_7(results)
        assert [one.status for one in results.claims] == [status] * 2
