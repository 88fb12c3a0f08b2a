"""The largest stable learning rate of the toy net by depth, with a gate and without (equation 7).

The net is x_L = (1 + alpha w)^L x_0, to be 50 x_0, with the inputs of Figure 2 and the cost
mean ln cosh(x_L - 50 x_0): its derivative by x_L is at most 1, as a cross entropy's is.
"""

import numpy as np

from experiments.toy import FACTOR, INPUTS

UPDATES = 100
LOWEST, HIGHEST = 1e-20, 1e2  # bounds of the search
PRECISION = 0.01  # of its logarithm


def cost(alpha: float, w: float, layers: int) -> float:
    """The mean over the inputs of ln cosh(x_L - 50 x_0)."""
    gap = np.abs(((1 + alpha * w) ** layers - FACTOR) * INPUTS)
    return float((gap + np.log1p(np.exp(-2 * gap)) - np.log(2)).mean())


def gradient(alpha: float, w: float, layers: int) -> tuple[float, float]:
    """The derivatives of `cost` by alpha and by w."""
    gain = 1 + alpha * w
    slopes = np.tanh((gain**layers - FACTOR) * INPUTS)
    outer = float((slopes * INPUTS).mean() * layers * gain ** (layers - 1))
    return outer * w, outer * alpha


def is_stable(rate: float, layers: int, *, gated: bool) -> bool:
    """Whether the cost stays finite and at or below its start for the first UPDATES updates.

    Args:
      gated: whether alpha starts at 0 and is trained; otherwise alpha stays 1. w starts at 1.
    """
    alpha, w = (0.0 if gated else 1.0), 1.0
    start = cost(alpha, w, layers)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(UPDATES):
            by_alpha, by_w = gradient(alpha, w, layers)
            alpha, w = alpha - rate * by_alpha * gated, w - rate * by_w
            if not cost(alpha, w, layers) <= start:
                return False
    return True


def largest_stable_rate(layers: int, *, gated: bool) -> float:
    """The largest stable learning rate, by bisection of its logarithm."""
    low, high = np.log(LOWEST), np.log(HIGHEST)
    while high - low > PRECISION:
        middle = (low + high) / 2
        if is_stable(float(np.exp(middle)), layers, gated=gated):
            low = middle
        else:
            high = middle
    return float(np.exp(low))
