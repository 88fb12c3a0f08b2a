"""Means with their intervals and entropies of texts, against closed forms and simulations."""

import math

import numpy as np
import pytest
from etils import epath

from experiments import entropies
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.errors import UserError
from rezero_jax.runs.files import write_json


def test_estimates_of_one_two_and_missing_draws():
    found = Estimate.of([1.0, 3.0])
    assert found == Estimate(2.0, 1.0, 2)
    # Student's distribution with one degree of freedom is Cauchy's: its quantile is a tangent.
    half = np.tan(np.pi * 0.95 / 2)
    np.testing.assert_allclose(found.interval(), (2 - half, 2 + half))
    assert found.p_value(2 + half) == pytest.approx(0.05)
    one = Estimate.of_all([5.0])
    assert (one.mean, one.count) == (5.0, 1)
    unknown = [one.standard_error, *one.interval(), *one.prediction(), one.p_value(1.0)]
    assert np.isnan(unknown).all()
    assert Estimate.of_all([1.0, None]) is None
    with pytest.raises(UserError, match="give at least one"):
        Estimate.of([])
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(UserError, match="confidence"):
            found.interval(confidence)


def test_intervals_hold_the_mean_and_one_more_draw_as_often_as_they_claim():
    *draws, one_more = np.random.default_rng(0).normal(7, 2, (4, 4000))
    found = [Estimate.of(row) for row in np.stack(draws, 1)]
    for ends, value in (
        ([e.interval(0.9) for e in found], 7),
        ([e.prediction(0.9) for e in found], one_more),
    ):
        low, high = np.array(ends).T
        held = np.mean((low <= value) & (value <= high))
        assert abs(held - 0.9) < 3 * np.sqrt(0.9 * 0.1 / 4000)


def test_entropies_by_hand_and_as_the_loss_of_the_table_of_frequencies():
    # a b a a: singles 3/4, 1/4; pairs ab, ba, aa; triples aba, baa.
    found = entropies.of_text(np.frombuffer(b"abaa", np.uint8))
    assert found["unigram"] == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert found["bigram"] == pytest.approx(2 / 3)  # of the pairs' first bytes, a b a, two are a
    assert found["trigram"] == pytest.approx(0)
    letters = np.random.default_rng(1).integers(0, 3, 400, dtype=np.uint8)
    counts = np.zeros((3, 3))
    np.add.at(counts, (letters[:-1], letters[1:]), 1)
    model = counts / counts.sum(1, keepdims=True)
    loss = -np.log2(model[letters[:-1], letters[1:]]).mean()
    assert entropies.of_text(letters)["bigram"] == pytest.approx(loss)


def test_entropies_of_a_run_are_of_its_training_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("ab" * 900 + "zzzz" * 50)  # the last tenth is not trained on
    data = {"name": "text", "path": str(path), "eval_split": "validation"}
    write_json(tmp_path / "config.json", {"data": data})
    found = entropies.of_run(epath.Path(tmp_path))
    assert found["unigram"] == pytest.approx(1)
    assert found["bigram"] == pytest.approx(0, abs=1e-9)
