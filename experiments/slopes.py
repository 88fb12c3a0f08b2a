"""What a coordinate check found of a rule, and what the slopes over the size say."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rezero_jax.analysis.statistics import Estimate

# How far from 0 a slope may be to be flat: half of the smallest that another theory predicts.
FLAT = {
    # Branches times depth^-alpha, at a rate that does not fall with depth, change activations by
    # about depth^(1 - alpha) at first: slopes of 1, 1/2 and 0 for alpha 0, 1/2 and 1 (CompleteP).
    "change": 1 / 4,
    # How nonlinear a layer is in a change d of its weights, is about |d| where its activation is
    # smooth and |d|^(1/2) where it has a kink. Under depth_mup d is about depth^(-1/2).
    "nonlinearity": 1 / 8,
}


class Slope(NamedTuple):
    """Of log value over log size; flat within so much of 0."""

    estimate: Estimate
    flat: float

    @classmethod
    def of(cls, sizes: Sequence[int], values: np.ndarray, flat: float) -> "Slope":
        """By least squares in each seed; values (seeds, sizes)."""
        x = np.log(sizes)
        with np.errstate(all="ignore"):
            y = np.log(values)
        centred = x - x.mean()
        return cls(Estimate.of(y @ centred / (centred @ centred)), flat)

    @property
    def verdict(self) -> str:
        """What the 95 % interval says: "flat", "grows", "shrinks" or "undecided"."""
        low, high = self.estimate.interval()
        if not np.isfinite([low, high]).all():
            return "undecided"
        if low >= -self.flat and high <= self.flat:
            return "flat"
        return "grows" if low > self.flat else "shrinks" if high < -self.flat else "undecided"

    def __str__(self) -> str:
        low, high = self.estimate.interval()
        return f"{self.estimate.mean:+.2f} ({low:+.2f} to {high:+.2f}), {self.verdict}"


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """What was measured of a rule.

    Attributes:
      rule: its name.
      sizes: depths or widths.
      activation: mean |x| (seeds, sizes, updates + 1), before the first update and after each.
      change: mean |x - x_0| of the same shape.
      nonlinearity: |x - x_0 - J d| / |J d| of the last layer, (seeds, sizes).
    """

    rule: str
    sizes: list[int]
    activation: np.ndarray
    change: np.ndarray
    nonlinearity: np.ndarray

    @property
    def slopes(self) -> dict[str, Slope]:
        """Of the change after the last update and of the nonlinearity."""
        values = {"change": self.change[:, :, -1], "nonlinearity": self.nonlinearity}
        return {name: Slope.of(self.sizes, values[name], FLAT[name]) for name in FLAT}

    def to_json(self) -> dict[str, Any]:
        """All of it, with the slopes and their verdicts."""
        return {
            "activation": self.activation.tolist(),
            "change": self.change.tolist(),
            "nonlinearity": self.nonlinearity.tolist(),
            "slopes": {
                name: {
                    "mean": slope.estimate.mean,
                    "interval": list(slope.estimate.interval()),
                    "verdict": slope.verdict,
                }
                for name, slope in self.slopes.items()
            },
        }
