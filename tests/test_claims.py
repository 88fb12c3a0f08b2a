"""Statistics against numbers computed by hand or by SciPy, and the claims that they decide."""

import itertools
import math

import numpy as np
import pytest
from etils import epath
from scipy import stats

from experiments import alpha_init, entropies, fc
from experiments.published import Claim
from experiments.results import Results, Row
from experiments.statistics import (
    NOT_SIGNIFICANT,
    Censored,
    Sample,
    decide,
    dunnett,
    fisher,
    holds,
    holm,
    paired,
    quotients,
    together,
    verdict,
)
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.errors import UserError
from rezero_jax.runs.files import write_json

T4 = 2.776445  # of four degrees of freedom, two-sided 95 %
D = np.array([-2, -1, 0, 1, 2]) / math.sqrt(0.5)  # five draws with a standard error of 1
ERROR = 0.7


def spread(mean, error):
    """Five draws with this mean and standard error."""
    return [float(mean + d * error) for d in D]


def ratio(mean, error):
    return Sample([math.exp(draw) for draw in spread(math.log(mean), error)], log=True)


def test_a_verdict_is_where_the_whole_interval_lies():
    for interval, bounds, word in (
        ((1, 2), (0,), "higher"),
        ((-2, -1), (0,), "lower"),
        ((-1, 1), (0,), NOT_SIGNIFICANT),
        ((1, 2), (0.9, 2.1), "within"),
        ((0, 0), (-math.inf, 0), NOT_SIGNIFICANT),
        ((1, 2), (2.1, 3), "lower"),
        ((1, 2), (1.5, 3), NOT_SIGNIFICANT),
        ((1, 2), (0, math.inf), "within"),
        ((1, 2), (-math.inf, 0), "higher"),
        ((math.nan, math.nan), (0, 1), NOT_SIGNIFICANT),
        (None, (0, 1), NOT_SIGNIFICANT),
    ):
        assert verdict(interval, *bounds) == word
        assert holds(word) is {"within": True, NOT_SIGNIFICANT: None}.get(word, False)
    parts = ([True, None, False], [True, None], [True, True], [])
    assert [together(of) for of in parts] == [False, None, True, None]


def test_samples_have_means_intervals_and_words_for_what_is_missing():
    sample = Sample([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7 / 3)  # t of two degrees of freedom
    assert sample.interval() == pytest.approx((3 - half, 3 + half))
    assert sample.prediction() == pytest.approx((3 - 2 * half, 3 + 2 * half))
    geometric = Sample([2.0, 8.0], log=True)
    spread_of = math.exp(12.7062 * math.log(2))
    assert geometric.mean == pytest.approx(4)
    assert geometric.interval() == pytest.approx((4 / spread_of, 4 * spread_of), rel=1e-4)
    assert Sample([1.0]).interval() is None
    assert Sample([1.0]).shown == "1"
    assert Sample([None, 1.0]).shown == "diverged in 1 of 2"
    assert Sample([None, None]).shown == "diverged"
    assert Sample([math.nan, 1.0]).shown == "undefined"


def test_a_censored_time_is_a_bound_and_never_significant():
    times, ours = (Censored(300.0), 75.0), (10.0, 10.0)
    bound = Sample(quotients(times, ours), log=True)
    assert bound.shown == ">= 15 (1 of 2 right-censored)"  # sqrt(30 * 7.5)
    assert bound.mean is bound.interval() is None
    assert bound.p_value(7, 15) == 1
    assert math.isnan(quotients(ours, times)[0])
    assert paired((3.0, None), (1.0, 1.0)) == (2.0, None)
    assert isinstance(paired(times, ours)[0], Censored)
    assert fisher(Sample(times * 5), Sample(ours * 5)) == pytest.approx(
        stats.fisher_exact([[5, 5], [10, 0]]).pvalue
    )


def test_holm_steps_down():
    # 0.01 <= 0.05 / 3; 0.02 <= 0.05 / 2; 0.06 > 0.05.
    assert holm([0.06, 0.01, 0.02]) == [
        (pytest.approx(0.05), False),
        (pytest.approx(0.05 / 3), True),
        (pytest.approx(0.05 / 2), True),
    ]
    # 0.03 > 0.05 / 2, so 0.04 is not significant either, although it is below 0.05.
    assert [significant for _, significant in holm([0.001, 0.03, 0.04])] == [True, False, False]


def test_e1_decides_by_holm_against_the_nearer_bound():
    """Standard errors of 0.1 on ln: t is 10 times the distance to ln 7 or ln 15, the nearer one.

    That is 3.567 for a ratio of 10, 6.931 for 3.5 and 2.877 for 20; the critical values of 4
    degrees of freedom are 2.776 at 0.05, 3.495 at 0.05 / 2 and 3.961 at 0.05 / 3.
    """
    decisions = decide([ratio(10, 0.1), ratio(3.5, 0.1), ratio(20, 0.1)], 7, 15)
    assert [decision.verdict for decision in decisions] == ["within", "lower", "higher"]
    for decision, mean, t in zip(decisions, (10, 3.5, 20), (3.495406, 3.960763, T4), strict=True):
        width = math.exp(t * 0.1)
        assert decision.interval == pytest.approx((mean / width, mean * width), rel=1e-4)
    # Without the smallest, 10 is first in line: 3.567 < 3.961, and nothing is significant after it.
    decisions = decide([ratio(10, 0.1), ratio(20, 0.1), ratio(20, 0.1)], 7, 15)
    assert [decision.verdict for decision in decisions] == [NOT_SIGNIFICANT] * 3
    # A censored ratio counts in Holm's m: 10 is tested at 0.05 / 3.
    censored = Sample([Censored(30.0)] * 5, log=True)
    assert decide([censored, ratio(10, 0.1)], 7, 15)[1].verdict == "within"
    assert decide([censored, censored, ratio(10, 0.1)], 7, 15)[2].verdict == NOT_SIGNIFICANT


def test_dunnett_allows_for_many_rules_against_one_control():
    """Dunnett's table (1964): 2.68 for three rules and 12 degrees of freedom, two-sided 5 %."""
    rng = np.random.default_rng(0)
    control, *others = rng.normal(0, 1, (4, 4))
    pooled = math.sqrt(np.mean([sample.var(ddof=1) for sample in (control, *others)]) / 2)
    for sample, (low, high) in zip(others, dunnett(control, others), strict=True):
        assert (low + high) / 2 == pytest.approx(sample.mean() - control.mean(), abs=0.01)
        assert (high - low) / 2 == pytest.approx(2.68 * pooled, rel=0.03)


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


# ---- Claims


def claim(draws, **kwargs):
    results = Results("fc", "paper")
    results.bounded("a", "UAI 1", "x", draws, **kwargs)
    return results.claims[0]


def test_an_interval_decides_a_claim_and_never_a_mean():
    half = T4 * ERROR
    assert claim(spread(half + 0.01, ERROR), low=0).holds is True
    assert claim(spread(half - 0.01, ERROR), low=0).holds is None  # the mean is 1.9
    assert claim(spread(-half - 0.01, ERROR), low=0).holds is False
    found = claim(spread(3, ERROR), low=0)
    assert found.n == 5
    assert found.interval == pytest.approx((3 - half, 3 + half), rel=1e-5)
    for draws in ([7.0], [7.0, None, 7.1]):
        assert claim(draws, low=0).holds is None


def test_the_status_of_a_claim():
    """A reduced setting tests nothing, and a weak test is at most compatible."""
    for mean in (-9.0, 9.0):
        assert claim(spread(mean, 0.1), low=0, reduced=True).status == "not tested"
    assert Claim("a", "UAI 1", True, "x").status == "replicated"
    assert Claim("a", "UAI 1", True, "x", weak=True).status == "compatible"
    for found, weak in itertools.product((None, False), (True, False)):
        assert Claim("a", "UAI 1", found, "x", weak=weak).status == "not supported"


def test_figure_5_is_judged_by_three_ratios():
    """All are above 1; one of 6.9 is not significant against 7 to 15, as its interval holds 7."""
    results = Results("fc", "paper")
    for setting, mean, error in zip(fc.BASELINES, (6.9, 10, 10), (0.1, 0.05, 0.05), strict=True):
        draws = ratio(mean, error).draws
        results.add(setting, "epochs to 0.1", draws)
        results.add(setting, "times ReZero's epochs to 0.1", draws, log=True)
    fc.times_faster(results)
    assert [one.holds for one in results.claims] == [True] * 3 + [None, None] + [True] * 3


@pytest.mark.parametrize(
    ("small", "larger", "expected"),
    [(1.01, 1.05, True), (1.01, 1.2, False), (1.01, 0.8, False), (1.01, None, None)],
)
def test_a_range_of_initial_alphas_behaves_like_0_if_both_ends_do(small, larger, expected):
    results = Results("alpha_init", "cpu")
    results.add("alpha = 0", "epochs to 1.2", (3.5,) * 5)
    for alpha, factor in ((0.001, small), (0.01, larger), (0.1, 2.0)):
        error = 0.001
        draws = ratio(factor, error).draws if factor else (Censored(2.3),) * 5
        results.add(f"alpha = {alpha}", alpha_init.RATIO, draws, log=True)
    alpha_init.conclude(results)
    (found,) = results.claims
    assert found.holds is expected
    assert (found.interval is None) == (larger is None)
    assert results.remarks[-1].startswith("alpha = 0.1: higher; 2 (")
    assert found.status == "not tested"


def of_one_more_run(*rows, scale="paper"):
    results = Results("notebook_resnet", scale)
    results.one_more_run("a", rows, 2)
    return results.claims[0]


def notebook_claim(*gaps, scale="paper"):
    """The notebook has 49.52 and 53.50 %; ours are `gaps` standard errors of one run below."""
    papers = {"ResNet-20 + ReZero": 49.52, "ResNet-56 + ReZero": 53.50}
    rows = [
        # The deviation of one more run from the mean of five is sqrt(6) of its standard error.
        Row(name, "accuracy % after epoch 1", tuple(spread(value - gap, 1 / math.sqrt(6))))
        for (name, value), gap in zip(papers.items(), gaps, strict=False)
    ]
    return of_one_more_run(*rows, scale=scale)


def test_a_notebooks_run_is_judged_by_the_prediction_interval():
    inside, outside = T4 - 0.01, 3.495406 + 0.01  # the latter at 97.5 %, as two numbers are tested
    assert notebook_claim(inside, -inside).status == "replicated"
    assert notebook_claim(inside, T4 + 0.01).holds is None
    assert notebook_claim(outside, inside).holds is False
    assert notebook_claim(outside, scale="smoke").status == "not tested"
    # A printed number is inside if a number that rounds to it is.
    assert notebook_claim(T4 + 0.004).status == "replicated"
    assert notebook_claim(T4 + 0.006).holds is None
    single = Row("ResNet-20", "accuracy % after epoch 1", (43.43,))
    assert of_one_more_run(single).holds is None
    wide = Row("ResNet-20", "accuracy % after epoch 1", tuple(spread(43, 5)))
    assert of_one_more_run(wide).status == "compatible"
