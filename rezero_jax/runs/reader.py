"""Reads a finished or unfinished run: its config, its metrics, and when it reached a target."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rezero_jax.config import flatten
from rezero_jax.errors import UserError, choose_from
from rezero_jax.runs.files import AnyPath, folder_of, read_json
from rezero_jax.runs.folder import device, read_environment, read_final
from rezero_jax.runs.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of one workdir.

    Examples:
      >>> from rezero_jax.runs.reader import Run
      >>> steps, losses = Run.read("runs/digits").series("train/loss")
    """

    folder: epath.Path
    config: dict[str, Any]  # "a.b" -> value
    lines: list[dict[str, float]]  # of metrics.jsonl

    @classmethod
    def read(cls, folder: AnyPath) -> "Run":
        """The run in `folder`, finished or not; raises a UserError if there is none."""
        home = folder_of(folder)
        return cls(home, flatten(read_json(home / "config.json")), read_metrics(home))

    @classmethod
    def read_all(cls, folders: Sequence[AnyPath]) -> list["Run"]:
        """The runs in `folders`; of several, files and folders without a run are left out."""
        if len(folders) == 1:
            return [cls.read(folders[0])]
        found = [f for f in folders if (folder_of(f) / "config.json").is_file()]
        if not found:
            raise UserError(f"none of the {len(folders)} folders holds a run; name run folders")
        left = [str(f) for f in folders if f not in found and folder_of(f).is_dir()]
        if left:
            print(f"folders without a run are left out: {', '.join(left)}", file=sys.stderr)
        return [cls.read(folder) for folder in found]

    def series(self, key: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of the lines that have `key`, float64 (lines,) each."""
        pairs = [(line[x], line[key]) for line in self.lines if key in line and x in line]
        return tuple(np.array(pairs, float).reshape(-1, 2).T)  # type: ignore[return-value]

    def epoch_losses(self) -> np.ndarray:
        """Mean training loss (nats) of each finished epoch, float64 (epochs,)."""
        return self.series("train/epoch_loss")[1]

    def evaluations(self, key: str) -> dict[int, float]:
        """Epoch -> value of `key`, such as "eval/accuracy", at the end of the epoch."""
        ends = (line for line in self.lines if {"epoch", "train/epoch_loss", key} <= line.keys())
        return {int(line["epoch"]): line[key] for line in ends}

    def time_to(self, metric: str, target: float) -> float | None:
        """When the run first reached the `target` of a metric; None if it never did.

        The result is a number of epochs for "loss" (see `epochs_to`), an epoch for "accuracy" (a
        fraction), a step for "bits_per_byte". Raises a UserError for another metric or a loss <= 0.
        """
        match metric:
            case "loss":
                return epochs_to(self.epoch_losses(), target)
            case "accuracy":
                accuracies = self.evaluations("eval/accuracy").items()
                return min((epoch for epoch, value in accuracies if value >= target), default=None)
            case "bits_per_byte":
                steps, values = self.series("eval/bits_per_byte")
                return min(steps[values <= target], default=None)
        raise choose_from("metric", metric, ("loss", "accuracy", "bits_per_byte"))

    def alphas(self, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """x (lines,) and the gates in these lines (lines, layers); without gates, 0 layers."""
        depth = sum(key.startswith("alpha/") for key in self.lines[0]) if self.lines else 0
        keys = [x, *(f"alpha/{layer}" for layer in range(depth))]
        rows = [[line[key] for key in keys] for line in self.lines if line.keys() >= set(keys)]
        values = np.array([row[1:] for row in rows], float).reshape(len(rows), depth)
        return np.array([row[0] for row in rows]), values

    def final(self) -> dict[str, Any]:
        """final.json; empty while the run has not ended."""
        return read_final(self.folder)

    @property
    def device(self) -> str:
        """The hardware of the last start."""
        return device(read_environment(self.folder))

    @property
    def diverged(self) -> bool:
        """Whether a loss, gradient or parameter was not finite."""
        return self.final().get("status") == "diverged"


def epochs_to(losses: Sequence[float] | np.ndarray, target: float) -> float | None:
    """Epochs, at least 1.0, until an epoch loss is at most `target`, log-linear between two epochs.

    `losses` are means of epochs 1, 2, ...; None if the `target`, above 0, is never reached.
    """
    if target <= 0:
        raise UserError(f"the target loss {target} is not positive; give one above 0")
    losses = np.asarray(losses, float)
    if not (losses <= target).any():
        return None
    after = int((losses <= target).argmax())
    if after == 0:
        return 1.0
    high, low = np.log(losses[after - 1 : after + 1])
    return float(after + (high - np.log(target)) / (high - low))
