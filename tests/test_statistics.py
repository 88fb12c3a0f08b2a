"""Means and their intervals, against closed forms and by how often they hold."""

import numpy as np
import pytest

from rezero_jax.analysis.statistics import Estimate
from rezero_jax.errors import UserError


def test_two_draws():
    found = Estimate.of([1.0, 3.0])
    assert found == Estimate(2.0, 1.0, 2)
    # Student's distribution with one degree of freedom is Cauchy's: its quantile is a tangent.
    half = np.tan(np.pi * 0.95 / 2)
    np.testing.assert_allclose(found.interval(), (2 - half, 2 + half))


def test_one_draw_tells_nothing_of_the_error():
    found = Estimate.of([5.0])
    assert (found.mean, found.count) == (5.0, 1)
    assert np.isnan([found.standard_error, *found.interval()]).all()


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(7, 2, (4000, 3))
    ends = np.array([Estimate.of(row).interval(0.9) for row in draws])
    held = np.mean((ends[:, 0] <= 7) & (ends[:, 1] >= 7))
    assert abs(held - 0.9) < 3 * np.sqrt(0.9 * 0.1 / 4000)


def test_the_prediction_holds_one_more_draw_as_often_as_it_says():
    *draws, one_more = np.random.default_rng(0).normal(7, 2, (4, 4000))
    ends = np.array([Estimate.of(row).prediction(0.9) for row in np.stack(draws, 1)])
    held = np.mean((ends[:, 0] <= one_more) & (ends[:, 1] >= one_more))
    assert abs(held - 0.9) < 3 * np.sqrt(0.9 * 0.1 / 4000)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(UserError, match="is no probability"):
        Estimate.of([1.0, 2.0]).interval(confidence)


def test_no_draws():
    with pytest.raises(UserError, match="give at least one"):
        Estimate.of([])
