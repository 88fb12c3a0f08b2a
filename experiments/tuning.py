"""The learning rate of a rule in a comparison: the best of a grid that grows at its edges."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

FARTHEST = 12  # steps of the grid from its middle, at most


class Grid(NamedTuple):
    """Learning rates middle * factor**k for whole k.

    Attributes:
      middle: the rate of k = 0.
      factor: between two neighbours, above 1.
      first: the initial k.
    """

    middle: float
    factor: float
    first: Sequence[int]

    def rate(self, k: int) -> float:
        """The learning rate of k, rounded to four digits so that commands show it exactly."""
        return float(f"{self.middle * self.factor**k:.4g}")

    def untried(self, losses: Mapping[int, float]) -> list[int]:
        """The k to try next; empty once the best k has a worse neighbour on both sides.

        Args:
          losses: final loss by k; not finite where training diverged.
        """
        if missing := [k for k in self.first if k not in losses]:
            return missing
        best = self.best(losses)
        if best is None:
            beyond = [min(losses) - 1]
        else:
            beyond = [k for k in (best - 1, best + 1) if k not in losses]
        return [k for k in beyond if abs(k) <= FARTHEST]

    def best(self, losses: Mapping[int, float]) -> int | None:
        """The k of the lowest loss, the smaller of two equal ones; None if all diverged."""
        finite = {k: loss for k, loss in losses.items() if math.isfinite(loss)}
        return min(finite, key=lambda k: (finite[k], k), default=None)
