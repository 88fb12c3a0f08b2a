"""One page on the state of a network: signals, gradients and gates by depth."""

import dataclasses
import textwrap
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool

from rezero_jax.analysis.gates import open_from
from rezero_jax.analysis.propagation import Loss, Propagation, propagate, random_projection, trunk
from rezero_jax.analysis.singular_values import mean_squared_singular_value
from rezero_jax.analysis.statistics import Estimate

WIDTH = 96  # characters per line of the page
ROWS = 24  # maximum rows in the table of layers
NAMED = 6  # maximum layers or ranges of layers that an entry names


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Measurements of a network, printed as one page.

    Attributes:
      propagation: signals and gradients by depth.
      jacobian: mean squared singular value of the Jacobian of all layers together.
      subject: title of the page.
    """

    propagation: Propagation
    jacobian: Estimate
    subject: str

    @property
    def is_gated(self) -> Bool[np.ndarray, " layers"]:
        """Whether each layer has a gate."""
        return ~np.isnan(self.propagation.alpha)

    def __str__(self) -> str:
        found, layers = self.propagation, len(self.propagation.names)
        before, after = (_number(float(found.cosine[point])) for point in (0, -1))
        mean, error = _number(self.jacobian.mean), _number(self.jacobian.standard_error)
        idle = f"{found.idle.sum()} of {layers} layers change x by less than 0.1 / {layers} of |x|"
        entries = {
            "layers": str(layers),
            "signal": f"|x| {_growth(found.signal)}, in the forward pass",
            "gradient": f"|dL/dx| {_growth(found.gradient[::-1])}, in the backward pass",
            "angles": f"cosine of two examples' x {before} before, {after} after the layers",
            "Jacobian": f"mean squared singular value {mean} +- {error}; 1 preserves lengths",
            "gates": self._gates(),
            "idle": idle + self._named("", found.idle),
        }
        lines = [
            textwrap.fill(f"{name:<10}{text}", WIDTH, subsequent_indent=" " * 10)
            for name, text in entries.items()
        ]
        return "\n".join([self.subject, "", *lines, "", *self._table()])

    def _gates(self) -> str:
        gated, sizes = self.is_gated, np.abs(self.propagation.alpha)
        count = int(gated.sum())
        if not count:
            return "none"
        is_open = sizes >= open_from(count)
        mean, largest = _number(sizes[gated].mean()), _number(sizes[gated].max())
        summary = f"{is_open.sum()} of {count} open (|alpha| >= 0.1 / {count}), mean |alpha| {mean}"
        return f"{summary}, largest {largest}" + self._named("; shut", gated & ~is_open)

    def _named(self, what: str, chosen: Bool[np.ndarray, " layers"]) -> str:
        ends = np.flatnonzero(np.diff(chosen.astype(int), prepend=0, append=0)).reshape(-1, 2)
        names = self.propagation.names
        ranges = [
            names[first] if after - first == 1 else f"{names[first]} to {names[after - 1]}"
            for first, after in ends
        ]
        more = len(ranges) - NAMED
        listed = ", ".join(ranges[:NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{what}: {listed}" if ranges else ""

    def _table(self) -> list[str]:
        found, layers = self.propagation, len(self.propagation.names)
        rows = np.unique(np.linspace(0, layers, min(layers + 1, ROWS)).round().astype(int))
        names = ("(input)", *found.names)
        width = max(len("after layer"), *map(len, names))
        head: tuple[str, ...] = ("|x|", "|dL/dx|", "cosine", "|x'-x|/|x|", "|dL/dw|")
        head += ("alpha",) * bool(self.is_gated.any())
        lines = [f"{'after layer':<{width}}" + "".join(f"{name:>12}" for name in head)]
        if len(rows) <= layers:
            lines.insert(0, f"{len(rows) - 1} of {layers} layers, evenly spaced:")
        values = (found.share, found.weight_gradient, found.alpha)
        of_layers = (np.append(np.nan, one) for one in values)
        columns = np.stack([found.signal, found.gradient, found.cosine, *of_layers])
        for row in rows:
            cells = "".join(f"{_number(value):>12}" for value in columns[:, row])
            lines.append(f"{names[row]:<{width}}{cells}".rstrip())
        return lines


def diagnose(
    model: nnx.Module, x: Any, loss: Loss = random_projection, subject: str | None = None
) -> Diagnosis:
    """Diagnoses a model from the arguments of `propagate`.

    Args:
      model: call `model.eval()` first if it has dropout.
      subject: title of the page; by default the model's class and the number of examples.

    Examples:
      >>> from rezero_jax.analysis.diagnosis import diagnose
      >>> encoder = Encoder(64, depth=12, heads=4, residual="pre_norm", rngs=nnx.Rngs(0))
      >>> print(diagnose(encoder, jax.random.normal(jax.random.key(0), (8, 7, 64))))
    """
    found = propagate(model, x, loss)
    f, entered = trunk(model, x, loss)
    jacobian = mean_squared_singular_value(f, entered, key=jax.random.key(0))
    subject = subject or f"{type(model).__name__}, means over {len(entered)} examples"
    return Diagnosis(found, jacobian, subject)


def by_layer(model: nnx.Module, batch: Any, loss: Loss) -> dict[str, float]:
    """Measurements by layer while a run trains, a value of eval.metrics.

    Returns:
      By layer, "signal" (|x|), "gradient" (|dL/dx|) and "weight_gradient" of `Propagation`, and
      the mean squared singular value of all layers together.
    """
    found = propagate(model, batch, loss)
    f, entered = trunk(model, batch, loss)
    jacobian = mean_squared_singular_value(f, entered, probes=4, key=jax.random.key(0))
    values = {"mean_squared_singular_value": jacobian.mean}
    for name in ("signal", "gradient", "weight_gradient"):
        values |= {f"{name}/{i}": float(v) for i, v in enumerate(getattr(found, name))}
    return values


def _growth(values: Array | np.ndarray) -> str:
    first, last, layers = np.float64(values[0]), np.float64(values[-1]), len(values) - 1
    with np.errstate(all="ignore"):
        factor, each = last / first, (last / first) ** (1 / layers)
    return f"{_number(first)} -> {_number(last)}, x {_number(factor)}, x {_number(each, 5)} a layer"


def _number(value: float | np.floating, digits: int = 3) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}g}"
