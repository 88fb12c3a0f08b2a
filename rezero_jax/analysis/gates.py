"""What the gates did during a run (paper, Figure 8)."""

import dataclasses

import numpy as np
from jaxtyping import Float, Real

from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run


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
        """The logged gates of a run.

        Raises:
          UserError: the run has logged nothing yet, or its network has no gates.
        """
        gates = cls(*run.alphas()) if run.lines else None
        if gates is None or not gates.alphas.size:
            why = "has no gates" if run.lines else "has logged nothing yet"
            raise UserError(f"the run in {run.folder} {why}; choose one of a gated network")
        return gates

    @property
    def mean_abs(self) -> Float[np.ndarray, " lines"]:
        """Mean |alpha| over the layers; the paper ends at 0.0898 (12 layers) and 0.0185 (64)."""
        return np.abs(self.alphas).mean(axis=1)

    @property
    def peak_steps(self) -> Real[np.ndarray, " layers"]:
        """The logged step at which each |alpha| is largest."""
        return self.steps[np.abs(self.alphas).argmax(axis=0)]
