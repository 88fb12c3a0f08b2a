"""Figure 2: paths of gradient descent in a net of five layers with one weight and one gate.

The net is x_L = (1 + alpha w)^L x_0 with L = 5 (equation 5). It learns x_L = 50 x_0 from nine
inputs by plain gradient descent on the mean of (x_L - 50 x_0)^2. Largest stable learning rates
(equation 7) are those of ln cosh, whose derivative is at most 1 like a cross entropy's.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import drawing
from experiments.published import quoted
from experiments.results import Curve, Results

LAYERS, FACTOR = 5, 50.0
INPUTS = np.linspace(1.0, 1.8, 9)
STARTS = (0.5, 1.5, 2.5, 3.5, 4.5)
RATE = 1e-6
SOLUTION = FACTOR ** (1 / LAYERS) - 1  # alpha w of all solutions
STABLE_UPDATES = 100
PRECISION = 0.01  # of the logarithm of the largest stable rate
CLOSE = 0.01  # relative distance from the solution at which the updates are counted


def cost(alpha: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Mean over the inputs of (x_L - 50 x_0)^2, in the broadcast shape of alpha and w."""
    return ((1 + alpha * w) ** LAYERS - FACTOR) ** 2 * np.mean(INPUTS**2)


def gradient(alpha: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of `cost` by alpha and by w (equations 6 and 8), in the shape of the cost."""
    gain = 1 + alpha * w
    outer = 2 * np.mean(INPUTS**2) * (gain**LAYERS - FACTOR) * LAYERS * gain ** (LAYERS - 1)
    return outer * w, outer * alpha


def descend(start: float, rate: float = RATE) -> np.ndarray:
    """The path (alpha, w) from (0, start), (updates + 1, 2), until it no longer moves."""
    path = [np.array([0.0, start])]
    while len(path) < 2 or np.any(path[-1] != path[-2]):
        path.append(path[-1] - rate * np.array(gradient(*path[-1])))
        # Rounding may alternate forever between two neighbours in the last digits.
        if len(path) > 3 and np.array_equal(path[-1], path[-3]):
            break
    return np.array(path)


def soft_cost(alpha: float, w: float, layers: int) -> float:
    """The mean over the inputs of ln cosh(x_L - 50 x_0)."""
    gap = np.abs(((1 + alpha * w) ** layers - FACTOR) * INPUTS)
    return float((gap + np.log1p(np.exp(-2 * gap)) - np.log(2)).mean())


def soft_gradient(alpha: float, w: float, layers: int) -> tuple[float, float]:
    """The derivatives of `soft_cost` by alpha and by w."""
    gain = 1 + alpha * w
    slopes = np.tanh((gain**layers - FACTOR) * INPUTS)
    outer = float((slopes * INPUTS).mean() * layers * gain ** (layers - 1))
    return outer * w, outer * alpha


def largest_stable_rate(layers: int, *, gated: bool) -> float:
    """The largest learning rate whose first updates never raise `soft_cost` above its start.

    If gated, alpha starts at 0 and is trained; otherwise alpha stays 1. w starts at 1.
    """

    def is_stable(rate: float) -> bool:
        alpha, w = (0.0 if gated else 1.0), 1.0
        start = soft_cost(alpha, w, layers)
        for _ in range(STABLE_UPDATES):
            by_alpha, by_w = soft_gradient(alpha, w, layers)
            alpha, w = alpha - rate * by_alpha * gated, w - rate * by_w
            if not soft_cost(alpha, w, layers) <= start:  # nor is NaN
                return False
        return True

    low, high = np.log(1e-20), np.log(1e2)
    with np.errstate(over="ignore", invalid="ignore"):
        while high - low > PRECISION:
            middle = (low + high) / 2
            low, high = (middle, high) if is_stable(float(np.exp(middle))) else (low, middle)
    return float(np.exp(low))


def measure(results: Results, runs: Any) -> None:
    """Where the paths end, and after how many updates they reach the solution; without runs."""
    results.add("solutions", "alpha w", (SOLUTION,))
    ends = []
    for start in STARTS:
        path, name = descend(start), f"w0 = {start}"
        alpha, w = (float(x) for x in path[-1])
        distance = np.abs(path.prod(1) / SOLUTION - 1)
        results.add(name, "alpha at the end", (alpha,))
        results.add(name, "w at the end", (w,))
        results.add(name, "alpha w at the end", (alpha * w,))
        results.add(name, "updates", (float(np.argmax(distance < CLOSE)),))
        ends.append(alpha * w)
        results.curves[name] = Curve(path[:, 0].tolist(), path[:, 1].tolist())
    text = "From alpha = 0 gradient descent finds a solution, alpha w ~ 1.2"
    evidence = f"alpha w at the five ends is {quoted(ends)}, the solution {SOLUTION:.6f}; exact"
    found = max(abs(end / SOLUTION - 1) for end in ends) < 1e-9
    results.claim(text, "UAI 4", found, evidence, len(STARTS))


def plot(results: Results) -> Figure:
    """The contour of ln ||dC||, lines 4 apart as in the figure, with the paths on it."""
    figure, (axis,) = drawing.sheet_of(results, height=5)
    alpha, w = np.meshgrid(np.linspace(0, 1.1, 300), np.linspace(-1.5, 5.3, 300))
    with np.errstate(divide="ignore"):
        height = np.log(np.hypot(*gradient(alpha, w)))
    axis.grid(False)
    heights = np.arange(-4, 20.1, 1)
    shades = axis.contourf(alpha, w, height, levels=heights, cmap="Greys", extend="both")
    shades.set_rasterized(True)
    axis.contour(alpha, w, height, levels=np.arange(0, 20, 4), colors="#666666", linewidths=0.6)
    figure.colorbar(shades, ax=axis, label="ln of the gradient's norm")
    there = np.linspace(SOLUTION / 5.3, 1.1, 200)
    axis.plot(there, SOLUTION / there, color="#D55E00")
    for curve in results.curves.values():
        axis.plot(curve.x, curve.y, color="#0072B2", marker=".", ms=3, lw=1, rasterized=True)
    axis.set(xlabel="alpha", ylabel="w", xlim=(0, 1.1), ylim=(-1.5, 5.3))
    names = ["solutions", "descent, a dot an update"]
    axis.legend(axis.lines[:2], names, frameon=True, framealpha=1, loc="upper right")
    return figure
