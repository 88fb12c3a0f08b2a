"""The gates of a run by step and layer (paper, Figure 8)."""

import dataclasses

import numpy as np
from jaxtyping import Float, Real

from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run


def open_from(gates: int) -> float:
    """The smallest |alpha| of an open gate: a tenth of 1 / gates, the average in the paper."""
    return 0.1 / gates


@dataclasses.dataclass(frozen=True)
class Gates:
    """Every alpha by step and layer.

    Attributes:
      steps: number of updates at each logged line.
      alphas: the gates at these lines, layer 0 first.
    """

    steps: Real[np.ndarray, " lines"]
    alphas: Float[np.ndarray, "lines layers"]

    @classmethod
    def of_run(cls, run: Run) -> "Gates":
        """The logged gates of a run; raises UserError if there are none."""
        gates = cls(*run.alphas()) if run.lines else None
        if gates is None or not gates.alphas.size:
            why = "has no gates" if run.lines else "has logged nothing yet"
            raise UserError(f"the run in {run.folder} {why}; choose a run of a gated network")
        return gates

    @property
    def mean_abs(self) -> Float[np.ndarray, " lines"]:
        """Mean |alpha| over the layers; finally 0.0898 (12 layers) and 0.0185 (64) in the paper."""
        return np.abs(self.alphas).mean(axis=1)

    @property
    def opening_steps(self) -> Float[np.ndarray, " layers"]:
        """The first logged step at which each gate is open; NaN if it never opens."""
        is_open = np.abs(self.alphas) >= open_from(self.alphas.shape[1])
        return np.where(is_open.any(axis=0), self.steps[is_open.argmax(axis=0)], np.nan)

    @property
    def opening(self) -> str:
        """When the gates opened, in a sentence."""
        steps = self.opening_steps
        known, count = steps[~np.isnan(steps)], len(steps)
        if not known.size:
            return f"none of {count} gates has opened (|alpha| >= 0.1 / {count})"
        first, half, last = (int(np.quantile(known, q, method="lower")) for q in (0, 0.5, 1))
        sentence = f"{len(known)} of {count} gates opened (|alpha| >= 0.1 / {count}), "
        if first == last:
            return f"{sentence}all by step {first:,}"
        return (
            f"{sentence}the first by step {first:,}, half of them by step {half:,}, the last by "
            f"step {last:,}; the earliest is layer {int(np.nanargmin(steps))} and the latest layer "
            f"{int(np.nanargmax(steps))}"
        )

    @property
    def peak_steps(self) -> Real[np.ndarray, " layers"]:
        """The logged step at which each |alpha| is largest."""
        return self.steps[np.abs(self.alphas).argmax(axis=0)]
