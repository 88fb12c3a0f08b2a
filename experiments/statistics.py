"""Statistics of a few runs: samples, verdicts against bounds, and corrections for many tests."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import stats

from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import number

LEVEL = 0.05  # of all tests; intervals have a confidence of 1 - LEVEL
NOT_SIGNIFICANT = "not significant"

Interval: TypeAlias = tuple[float, float]


class Censored(float):
    """A right-censored time: the run ended at this time without reaching the target."""


# None: the run diverged. NaN: undefined, such as a ratio to a censored time.
Draw: TypeAlias = float | Censored | None


def verdict(interval: Interval | None, low: float, high: float | None = None) -> str:
    """Where a whole interval is relative to (low, high) or, without `high`, to the bound `low`.

    "lower", "within", "higher" or, for all else, None and NaN, "not significant".
    """
    high = low if high is None else high
    if interval is None or math.isnan(interval[0] + interval[1]):
        return NOT_SIGNIFICANT
    if interval[1] < low:
        return "lower"
    if interval[0] > high:
        return "higher"
    inside = low < interval[0] and interval[1] < high
    return "within" if inside else NOT_SIGNIFICANT


def holds(word: str, needed: str = "within") -> bool | None:
    """Whether a verdict supports a claim that needs `needed`; None if it is not significant."""
    return None if word == NOT_SIGNIFICANT else word == needed


def together(parts: Sequence[bool | None]) -> bool | None:
    """Whether a claim of several parts holds: False if one part fails, True if all hold."""
    if False in parts:
        return False
    return True if parts and None not in parts else None


class Draws:
    """Statistics of independent draws."""

    draws: tuple[Draw, ...]  # a value for each run
    log: bool  # whether means are geometric and intervals those of the logarithms

    @property
    def estimate(self) -> Estimate | None:
        """The mean, on the log scale where `log` is set; None unless every draw is known."""
        return None if any(isinstance(draw, Censored) for draw in self.draws) else self._bound()

    def _bound(self) -> Estimate | None:
        """The estimate with censored times in place of the true ones, so a lower bound."""
        known = [draw for draw in self.draws if draw is not None and math.isfinite(draw)]
        if not known or len(known) < len(self.draws):
            return None
        return Estimate.of([math.log(draw) for draw in known] if self.log else known)

    @property
    def mean(self) -> float | None:
        """The mean over the runs; None unless every draw is known."""
        return None if self.estimate is None else self._back(self.estimate.mean)

    def interval(self, level: float = LEVEL) -> Interval | None:
        """Student's interval of the mean; None without two known draws."""
        return self._ends(Estimate.interval, level)

    def prediction(self, level: float = LEVEL) -> Interval | None:
        """Student's interval for one more draw; None without two known draws."""
        return self._ends(Estimate.prediction, level)

    def p_value(self, low: float, high: float) -> float:
        """Two-sided p-value of the t-test against the nearer bound; 1 where undefined."""
        if self.interval() is None or self.estimate is None:
            return 1.0
        mean = self.estimate.mean
        ends = (math.log(low), math.log(high)) if self.log else (low, high)
        return self.estimate.p_value(min(ends, key=lambda end: abs(end - mean)))

    @property
    def reached(self) -> int:
        """Number of draws that are neither censored, diverged nor undefined."""
        known = (draw for draw in self.draws if draw is not None and math.isfinite(draw))
        return sum(not isinstance(draw, Censored) for draw in known)

    @property
    def shown(self) -> str:
        """The mean and its 95 % interval as "31 (28 to 34)", a bound, or why there is none."""
        n, lost, bound = len(self.draws), self.draws.count(None), self._bound()
        if lost:
            return "diverged" + (f" in {lost} of {n}" if lost < n else "")
        if bound is None:
            return "undefined"
        text = number(self._back(bound.mean))
        if self.estimate is None:
            return f">= {text} ({n - self.reached} of {n} right-censored)"
        interval = self.interval()
        return text + (f" ({between(interval)})" if interval else "")

    def _ends(self, of: Callable[[Estimate, float], Interval], level: float) -> Interval | None:
        estimate = self.estimate
        if estimate is None or estimate.count < 2:
            return None
        low, high = of(estimate, 1 - level)
        return self._back(low), self._back(high)

    def _back(self, value: float) -> float:
        return math.exp(value) if self.log else value


class Sample(Draws):
    """Draws without a name."""

    def __init__(self, draws: Iterable[Draw], *, log: bool = False):
        self.draws, self.log = tuple(draws), log


def between(interval: Interval) -> str:
    """An interval as "7.1 to 9"."""
    return f"{number(interval[0])} to {number(interval[1])}"


def paired(one: Sequence[Draw], other: Sequence[Draw]) -> tuple[Draw, ...]:
    """Differences one - other of pairs of runs with the same seed and so the same batches."""
    return tuple(_pair(a, b, lambda a, b: a - b) for a, b in zip(one, other, strict=True))


def quotients(one: Sequence[Draw], other: Sequence[Draw]) -> tuple[Draw, ...]:
    """Ratios one / other of pairs of runs with the same seed and so the same batches."""
    return tuple(_pair(a, b, lambda a, b: a / b) for a, b in zip(one, other, strict=True))


def _pair(one: Draw, other: Draw, of: Callable[[float, float], float]) -> Draw:
    """A function of a pair, censored where only the first is, undefined where the other is."""
    if one is None or other is None:
        return None
    if isinstance(other, Censored):
        return math.nan
    value = of(float(one), float(other))
    return Censored(value) if isinstance(one, Censored) else value


def mapped(of: Callable[[float], float], draws: Sequence[Draw]) -> tuple[Draw, ...]:
    """An increasing function of draws, which leaves censored and missing ones as such."""
    return tuple(_pair(draw, 0.0, lambda draw, _: of(draw)) for draw in draws)


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[tuple[float, bool]]:
    """Holm's step-down procedure (1979): each test's level, and whether it is significant.

    The k-th smallest of m p-values is compared with level / (m + 1 - k), if all smaller ones are
    significant.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, significant = {}, True
    for rank, test in enumerate(order):
        compared = level / (len(order) - rank)
        significant = significant and p_values[test] <= compared
        found[test] = (compared, significant)
    return [found[test] for test in range(len(order))]


class Decision(NamedTuple):
    """The verdict on a sample after Holm's correction, and the interval that is as wide."""

    verdict: str
    interval: Interval | None


def decide(samples: Sequence[Draws], low: float, high: float) -> list[Decision]:
    """Verdicts on the means of samples against [low, high], Holm-corrected over all of them."""
    decisions = []
    tests = holm([sample.p_value(low, high) for sample in samples])
    for sample, (level, significant) in zip(samples, tests, strict=True):
        interval = sample.interval(level)
        word = verdict(interval, low, high) if significant else NOT_SIGNIFICANT
        decisions.append(Decision(word, interval))
    return decisions


def dunnett(control: Sequence[float], others: Sequence[Sequence[float]]) -> list[Interval]:
    """Simultaneous intervals of others - control by Dunnett's test, with a pooled variance."""
    result = stats.dunnett(*others, control=control, rng=np.random.default_rng(0))
    ends = result.confidence_interval(1 - LEVEL)
    return [(float(low), float(high)) for low, high in zip(ends.low, ends.high, strict=True)]


def fisher(one: Draws, other: Draws) -> float:
    """Two-sided p-value of Fisher's exact test that two samples reach a target equally often."""
    table = [[s.reached, len(s.draws) - s.reached] for s in (one, other)]
    return float(stats.fisher_exact(table).pvalue)
