"""Metrics of a run: one line of metrics.jsonl per logged step, and TensorBoard events."""

import json
from collections.abc import Callable
from typing import TextIO

from etils import epath
from tensorboardX import SummaryWriter

from rezero_jax.errors import UserError
from rezero_jax.runs.files import AnyPath, Upload, replace_file

# Number of lines that a resumed run writes to TensorBoard again. The file is written in blocks, so
# that a kill loses its last lines.
AGAIN = 200


class MetricsWriter:
    """Writes metrics.jsonl and the TensorBoard events.

    Args:
      folder: the workdir.
      step: updates applied so far; later lines are dropped, because a resumed run makes these
        updates again.
      check: called before each copy, see `Upload`.
    """

    def __init__(self, folder: AnyPath, step: int, check: Callable[[], None] = lambda: None):
        home = epath.Path(folder)
        self._upload = Upload(home, check)
        path = self._upload.folder / "metrics.jsonl"
        lines = read_metrics(home) if (home / "metrics.jsonl").exists() else []
        kept = [line for line in lines if line["step"] <= step]
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines: TextIO = path.open("a")
        again = kept[-AGAIN:]
        first = int(again[0]["step"]) if again else step + 1
        self._events = SummaryWriter(str(self._upload.folder / "tensorboard"), purge_step=first)
        for line in again:
            self._show(line)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics after `step` updates; in a bucket, they arrive with the next copy."""
        line = {"step": step} | metrics
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        self._show(line)
        if self._upload.is_due():
            self.flush()

    def _show(self, line: dict[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                self._events.add_scalar(name, value, int(line["step"]))

    def flush(self) -> None:
        """Returns when the workdir has all lines; raises an OSError if it cannot be written."""
        if self._upload.is_copied:
            self._events.flush()
            self._upload.flush()

    def close(self) -> None:
        """Closes the files; raises an OSError if the workdir cannot be written."""
        self._lines.close()
        self._events.close()
        self._upload.close()


def read_metrics(folder: AnyPath) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl, without a last line that a crash truncated.

    Raises a UserError if the file is missing.
    """
    path = epath.Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{folder} holds no run: there is no {path.name} in it; train there first")
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
