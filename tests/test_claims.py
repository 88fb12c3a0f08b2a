"""Statuses are decided by intervals; E1's decision rule against numbers computed by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import alpha_init
from experiments.claims import bounded, fact, holm, inside, paired, together
from experiments.notebooks import one_more_run
from experiments.ratios import Ratio, decide
from experiments.results import Row
from rezero_jax.analysis.statistics import Estimate

T4 = 2.776445  # Student's t of 4 degrees of freedom at 95 %, two-sided
D = (-2, -1, 0, 1, 2)  # deviation sqrt(2.5), so that the standard error of five is sqrt(0.5)
ERROR = math.sqrt(0.5)


def spread(mean, error):
    """Five draws of this mean and standard error."""
    return [mean + d * error / ERROR for d in D]


def claim(draws, **kwargs):
    return bounded("a", "UAI 1", "x", draws, **kwargs)


def test_an_interval_decides_and_never_a_mean():
    half = T4 * ERROR
    assert claim(spread(half + 0.01, ERROR), low=0).status == "replicated"
    assert claim(spread(half - 0.01, ERROR), low=0).status == "undecided"  # the mean is 1.95
    assert claim(spread(-half - 0.01, ERROR), low=0).status == "contradicted"
    found = claim(spread(3, ERROR), low=0)
    assert found.n == 5
    assert found.interval == pytest.approx((3 - half, 3 + half), rel=1e-5)


def test_one_run_or_a_missing_one_decides_nothing():
    assert claim([7.0], low=0).status == "undecided"
    assert claim([7.0, None, 7.1], low=0).status == "undecided"
    assert claim([], low=0).status == "undecided"


def test_a_reduced_setting_is_undecided_whatever_comes_out():
    for mean in (-9.0, 9.0):
        assert claim(spread(mean, 0.1), low=0, reduced=True).status == "undecided"
    for holds in (True, False, None):
        assert fact("a", "UAI 1", holds, "x", reduced=True).status == "undecided"


def test_fewer_runs_than_the_paper_has_are_consistent_at_best():
    assert claim(spread(9, 0.1), low=0, seeds=6).status == "consistent"
    assert claim(spread(-9, 0.1), low=0, seeds=6).status == "contradicted"
    assert fact("a", "UAI 1", True, "x", whole=False).status == "consistent"


def test_parts():
    assert inside((1, 2), 1, 2) is True
    assert inside((1, 2), 2.1, 3) is False
    assert inside((1, 2), 1.5, 3) is None
    assert together([True, None, False]) is False
    assert together([True, None]) is None
    assert together([True, True]) is True
    assert together([]) is None
    assert paired((3.0, None), (1.0, 1.0)) == (2.0, None)


def test_p_values_agree_with_tables_and_with_intervals():
    estimate = Estimate.of(spread(0, ERROR))
    assert estimate.p_value(T4 * ERROR) == pytest.approx(0.05, rel=1e-5)
    assert estimate.p_value(-4.604095 * ERROR) == pytest.approx(0.01, rel=1e-5)
    assert estimate.p_value(0.0) == 1
    assert Estimate.of([2.0, 2.0]).p_value(2.0) == 1
    assert Estimate.of([2.0, 2.0]).p_value(1.0) == 0
    assert math.isnan(Estimate.of([2.0]).p_value(1.0))


def test_holm_steps_down():
    # 0.01 <= 0.05 / 3; 0.02 <= 0.05 / 2; 0.06 > 0.05.
    assert holm([0.06, 0.01, 0.02]) == [
        (pytest.approx(0.05), False),
        (pytest.approx(0.05 / 3), True),
        (pytest.approx(0.05 / 2), True),
    ]
    # 0.03 > 0.05 / 2, so 0.04 is undecided as well, though it is below 0.05.
    assert [decided for _, decided in holm([0.001, 0.03, 0.04])] == [True, False, False]
    assert [decided for _, decided in holm([0.02, 0.02, 0.02])] == [False] * 3


def ratio(mean, error):
    return Ratio(tuple(spread(math.log(mean), error)))


def test_ratios_are_geometric_and_their_intervals_those_of_logarithms():
    found = Ratio.of_pairs([20.0, 80.0], [10.0, 10.0], [300, 300])
    assert found.mean == pytest.approx(4)
    one = ratio(10, 0.1)
    width = math.exp(T4 * 0.1)
    assert one.interval() == pytest.approx((10 / width, 10 * width), rel=1e-5)
    assert one.shown == "10 (7.576 to 13.2)"


def test_e1_decides_by_holm_against_the_nearer_bound():
    """Standard errors of 0.1 on ln: t is 10 times the distance to ln 7 or ln 15, the nearer one.

    That is 3.567 for a ratio of 10, 6.931 for 3.5 and 2.877 for 20; the critical values of 4
    degrees of freedom are 2.776 at 0.05, 3.495 at 0.05 / 2 and 3.961 at 0.05 / 3.
    """
    # 6.931 > 3.961 and 2.877 > 2.776: outside; 3.567 > 3.495: inside.
    decisions = decide([ratio(10, 0.1), ratio(3.5, 0.1), ratio(20, 0.1)], 7, 15)
    assert [decision.holds for decision in decisions] == [True, False, False]
    for decision, mean, t in zip(decisions, (10, 3.5, 20), (3.495406, 3.960763, T4), strict=True):
        width = math.exp(t * 0.1)
        assert decision.corrected == pytest.approx((mean / width, mean * width), rel=1e-4)
    # Without the smallest, 10 is first in line: 3.567 < 3.961, and nothing is decided after it.
    decisions = decide([ratio(10, 0.1), ratio(20, 0.1), ratio(20, 0.1)], 7, 15)
    assert [decision.holds for decision in decisions] == [None] * 3


def test_the_smallest_of_the_ratios_alone_decides_nothing():
    """A rule by min(ratios) would call this contradicted; its interval reaches over 7."""
    decisions = decide([ratio(6.9, 0.1), ratio(10, 0.05), ratio(10, 0.05)], 7, 15)
    assert [decision.holds for decision in decisions] == [None, True, True]
    assert together([decision.holds for decision in decisions]) is None


def test_what_does_not_arrive_is_a_bound_and_undecided():
    ours = [10.0, 10.0]
    found = Ratio.of_pairs([None, 75.0], ours, [300, 300])
    assert found.shown == ">= 15"  # sqrt(30 * 7.5)
    assert found.interval() is None
    assert found.p_value(7, 15) == 1
    assert Ratio.of_pairs([200.0, 200.0], [10.0, None], [300, 300]) is None
    # It counts in Holm's m: the others are tested at 0.05 / 3 and 0.05 / 2.
    decisions = decide([found, ratio(10, 0.1), None], 7, 15)
    assert [decision.holds for decision in decisions] == [None, None, None]
    assert decisions[1].corrected == pytest.approx(
        tuple(10 * np.exp(0.1 * np.array([-3.960763, 3.960763]))), rel=1e-4
    )


# ---- A1: what behaves like an initial alpha of 0


def runs_with(factors):
    """Five runs of each initial alpha, which take `factors` times the epochs of alpha = 0."""
    runs = {}
    for alpha in alpha_init.ALPHAS["cpu"]:
        runs[alpha_init.name(alpha)] = []
        for seed in range(5):
            factor = factors.get(alpha, 2.0)
            epochs = factor and (3.5 + 0.1 * seed) * factor * (1 + 0.001 * (seed - 2) * bool(alpha))
            run = SimpleNamespace(
                time_to=lambda metric, target, epochs=epochs: epochs,
                epoch_losses=lambda: np.array([1.7, 1.2]),
                alphas=lambda: (None, np.array([[0.1, -0.3]])),
                series=lambda key: ([1, 2], [1.7, 1.2]),
                config={"train.epochs": 8},
                final=lambda: {"steps": 4000},
                lines=[{}],
                diverged=False,
            )
            runs[alpha_init.name(alpha)].append(run)
    return runs


@pytest.mark.parametrize(
    ("factors", "word", "status"),
    [
        ({0.001: 1.01, 0.01: 1.05}, "supported", "replicated"),
        ({0.001: 0.95, 0.01: 1.0, 0.03: None}, "supported", "replicated"),
        ({0.001: 1.01, 0.01: 1.2}, "contradicted", "contradicted"),
        ({0.001: 1.01, 0.01: 0.8}, "contradicted", "contradicted"),
        ({0.001: 1.01, 0.01: 1.0999}, "undecided", "undecided"),
        ({0.001: 1.01, 0.01: None}, "undecided", "undecided"),
        ({0: None}, "undecided", "undecided"),
    ],
)
def test_a_range_of_initial_alphas_behaves_like_0_if_both_ends_do(factors, word, status):
    runs = runs_with({0: 1.0} | factors)
    for scale, expected in (("cpu", "undecided"), ("paper", status)):
        results = alpha_init.measure(scale, runs)
        (claim,) = results.claims
        assert claim.status == expected
        assert claim.evidence.startswith(f"in this setting {word};")
        assert (claim.interval is None) == (None in factors.values() and word != "supported")
    if word == "supported":
        low, high = claim.interval
        assert 1 / 1.1 < low < factors[0.001] < factors[0.01] < high < 1.1
        assert results.remarks[0].startswith("alpha = 0.001 behaves like 0: ")
        assert results.remarks[-1].startswith("alpha = 1 behaves otherwise: 2 (")


# ---- N1 and N2: one run of a notebook among the runs to expect


def notebook_claim(*gaps, reduced=False):
    """The notebook has 49.52 and 53.50 %; ours are so many standard errors of one run below."""
    papers = {"ResNet-20 + ReZero": 49.52, "ResNet-56 + ReZero": 53.50}
    rows = [
        # The deviation of one more run from the mean of five is sqrt(6) of its standard error.
        Row(name, "accuracy % after epoch 1", tuple(spread(value - gap, 1 / math.sqrt(6))))
        for (name, value), gap in zip(papers.items(), gaps, strict=False)
    ]
    return one_more_run("a", "notebook_resnet", rows, 2, reduced)


def test_a_notebooks_run_is_judged_by_the_interval_for_one_more():
    t4_at_975 = 3.495406  # two-sided 97.5 %, as two numbers are judged
    inside, between, outside = T4 - 0.01, T4 + 0.01, t4_at_975 + 0.01
    assert notebook_claim(inside, -inside).status == "replicated"
    assert notebook_claim(inside, between).status == "undecided"
    assert notebook_claim(inside, t4_at_975 - 0.01).status == "undecided"
    assert notebook_claim(outside, between).status == "contradicted"
    assert notebook_claim(outside, reduced=True).status == "undecided"
    wide = f"{49.53 - 2 * T4:.2f} to 49.53"  # the mean is T4 - 0.01 below the notebook's
    assert notebook_claim(inside).evidence == (
        f"outside of the interval for one more run of ours: none; the widest of them is {wide}"
    )


def test_a_printed_number_is_inside_if_what_rounds_to_it_is():
    assert notebook_claim(T4 + 0.004).status == "replicated"
    assert notebook_claim(T4 + 0.006).status == "undecided"


def test_a_single_run_says_nothing_of_a_notebooks():
    row = Row("ResNet-20", "accuracy % after epoch 1", (43.43,))
    assert one_more_run("a", "notebook_resnet", [row], 1, False).status == "undecided"
    assert Row("a", "b", (math.e, math.e**3), is_geometric=True).prediction() == pytest.approx(
        [math.exp(2 + side * 12.7062 * math.sqrt(3)) for side in (-1, 1)], rel=1e-3
    )
