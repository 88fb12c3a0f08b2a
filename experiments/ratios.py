"""Ratios of times over pairs of runs: their geometric mean, its interval, and what never arrived.

A pair is two runs with the same seed, which see the same batches in the same order.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.claims import LEVEL, holm, inside
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.formatting import number


class Ratio(NamedTuple):
    """A rival's time over ReZero's.

    Attributes:
      logs: ln of the ratio of each pair, with the cap in place of a missing time of the rival.
      is_bound: a time of the rival is missing, so that the mean is a lower bound.
    """

    logs: tuple[float, ...]
    is_bound: bool = False

    @classmethod
    def of_pairs(
        cls, rival: Sequence[float | None], ours: Sequence[float | None], caps: Sequence[float]
    ) -> "Ratio | None":
        """The ratio over pairs of times; None if one of ours is missing.

        Args:
          caps: the longest time that each run of the rival had.
        """
        if None in ours:
            return None
        logs = [
            math.log((cap if theirs is None else theirs) / mine)  # type: ignore[operator]
            for theirs, mine, cap in zip(rival, ours, caps, strict=True)
        ]
        return cls(tuple(logs), None in rival)

    @property
    def mean(self) -> float:
        """The geometric mean of the pairs' ratios."""
        return math.exp(Estimate.of(self.logs).mean)

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Student's interval on the logarithms; None of a bound or of a single pair."""
        if self.is_bound or len(self.logs) < 2:
            return None
        low, high = Estimate.of(self.logs).interval(1 - level)
        return math.exp(low), math.exp(high)

    def p_value(self, low: float, high: float) -> float:
        """Of the two-sided t-test against `low` or `high`, whichever is nearer; 1 if undefined."""
        if self.interval() is None:
            return 1.0
        estimate = Estimate.of(self.logs)
        nearer = min(math.log(low), math.log(high), key=lambda bound: abs(bound - estimate.mean))
        return estimate.p_value(nearer)

    @property
    def shown(self) -> str:
        """The mean with its 95 % interval, or with a sign that it is a bound."""
        if self.is_bound:
            return f">= {number(self.mean)}"
        interval = self.interval()
        return number(self.mean) + (f" ({between(interval)})" if interval else ", in a single pair")


def quotients(
    times: Sequence[float | None], others: Sequence[float | None]
) -> tuple[float | None, ...]:
    """The ratio of each pair of positive times; None where one is missing."""
    pairs = zip(times, others, strict=True)
    return tuple(time / other if time and other else None for time, other in pairs)


class Decision(NamedTuple):
    """What Holm's procedure says of a ratio.

    Attributes:
      holds: True if the ratio lies within the bounds, False if outside, None if undecided.
      corrected: its interval of confidence 1 - the level it was compared with.
    """

    holds: bool | None
    corrected: tuple[float, float] | None


def decide(ratios: Sequence[Ratio | None], low: float, high: float) -> list[Decision]:
    """Whether each ratio lies in [low, high], with Holm's correction over all of them at 5 %."""
    tests = holm([1.0 if ratio is None else ratio.p_value(low, high) for ratio in ratios])
    decisions = []
    for ratio, (level, decided) in zip(ratios, tests, strict=True):
        corrected = ratio.interval(level) if ratio else None
        holds = inside(corrected, low, high) if corrected and decided else None
        decisions.append(Decision(holds, corrected))
    return decisions


def between(interval: tuple[float, float]) -> str:
    """An interval as "7.1 to 9"."""
    return f"{number(interval[0])} to {number(interval[1])}"
