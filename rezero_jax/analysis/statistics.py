"""Means of small samples, with Student's intervals and tests."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from rezero_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The mean of a population, estimated from independent draws.

    The intervals are Student's, because a bootstrap undercovers for the few seeds of a comparison.
    Intervals and p-values are NaN for a single draw.

    Attributes:
      mean: mean of the draws.
      standard_error: sample standard deviation over sqrt(n); NaN for one draw.
      count: n, the number of draws.
    """

    mean: float
    standard_error: float
    count: int

    @classmethod
    def of(cls, draws: Sequence[float] | np.ndarray) -> "Estimate":
        """The estimate from the draws; raises UserError if there are none."""
        values = np.asarray(draws, float)
        if not values.size:
            raise UserError("a mean of no values is undefined; give at least one")
        with np.errstate(invalid="ignore"):  # an infinite draw has no deviation
            error = stats.sem(values) if len(values) > 1 else np.nan
        return cls(float(values.mean()), float(error), len(values))

    @classmethod
    def of_all(cls, draws: Sequence[float | None]) -> "Estimate | None":
        """The estimate from the draws, or None if a draw is missing (None)."""
        known = [draw for draw in draws if draw is not None]
        return cls.of(known) if known and len(known) == len(draws) else None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval for the mean of a normal population.

        Raises a UserError if the confidence is not between 0 and 1.
        """
        return self._around_mean(self.standard_error, confidence)

    def prediction(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's prediction interval for one more draw; see `interval`."""
        return self._around_mean(self.standard_error * float(np.sqrt(self.count + 1)), confidence)

    def _around_mean(self, scale: float, confidence: float) -> tuple[float, float]:
        if not 0 < confidence < 1:
            raise UserError(f"confidence={confidence} is not a probability; give one such as 0.95")
        if self.count < 2:
            return np.nan, np.nan
        half = float(stats.t.ppf((1 + confidence) / 2, self.count - 1)) * scale
        return self.mean - half, self.mean + half

    def p_value(self, mean: float) -> float:
        """The p-value of Student's two-sided test that the true mean is `mean`."""
        if self.count < 2:
            return np.nan
        gap = abs(self.mean - mean)
        if not self.standard_error:
            return float(gap == 0)
        return float(2 * stats.t.sf(gap / self.standard_error, self.count - 1))
