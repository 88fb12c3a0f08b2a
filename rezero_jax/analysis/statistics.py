"""The mean of a sample, its standard error and its confidence interval."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from rezero_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The mean of a population, estimated from independent draws.

    Attributes:
      mean: of the draws.
      standard_error: their deviation (with n - 1) over sqrt(n); NaN for a single draw.
      count: n, the number of draws.
    """

    mean: float
    standard_error: float
    count: int

    @classmethod
    def of(cls, draws: Sequence[float] | np.ndarray) -> "Estimate":
        """The estimate from at least one draw.

        Raises:
          UserError: there is none.
        """
        values = np.asarray(draws, float)
        if not values.size:
            raise UserError("a mean of no values is undefined; give at least one")
        count = len(values)
        with np.errstate(invalid="ignore"):  # an infinite draw has no deviation
            error = values.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
        return cls(float(values.mean()), float(error), count)

    @classmethod
    def of_all(cls, draws: Sequence[float | None]) -> "Estimate | None":
        """The estimate from draws of which None is a missing one; None unless all are known."""
        known = [draw for draw in draws if draw is not None]
        return cls.of(known) if known and len(known) == len(draws) else None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval, which holds the true mean of normal draws with this probability.

        It suits the few seeds of a comparison, where a bootstrap covers far less than it claims.
        Both ends are NaN for a single draw.

        Raises:
          UserError: the confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise UserError(f"confidence={confidence} is no probability; give one such as 0.95")
        if self.count < 2:
            return np.nan, np.nan
        half = float(stats.t.ppf((1 + confidence) / 2, self.count - 1)) * self.standard_error
        return self.mean - half, self.mean + half

    def prediction(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval, which holds one more normal draw with this probability.

        Both ends are NaN for a single draw.

        Raises:
          UserError: the confidence is not between 0 and 1.
        """
        low, high = self.interval(confidence)
        half = (high - low) / 2 * np.sqrt(self.count + 1)
        return self.mean - float(half), self.mean + float(half)

    def p_value(self, mean: float) -> float:
        """Of Student's two-sided test that the true mean is `mean`; NaN for a single draw.

        It is at most 1 - c exactly where the interval of confidence c leaves `mean` out.
        """
        if self.count < 2:
            return np.nan
        gap = abs(self.mean - mean)
        if not self.standard_error:
            return float(gap == 0)
        return float(2 * stats.t.sf(gap / self.standard_error, self.count - 1))
