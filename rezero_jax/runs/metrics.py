"""The metrics of a run: one line of metrics.jsonl per logged step, and TensorBoard's events."""

import json
from typing import TextIO

from etils import epath
from tensorboardX import SummaryWriter

from rezero_jax.errors import UserError
from rezero_jax.runs.files import AnyPath, replace_file
from rezero_jax.runs.outbox import Outbox

# TensorBoard's file is written in blocks, so that a kill loses its last lines: how many lines a
# resumed run writes there again.
AGAIN = 200


class MetricsWriter:
    """Writes metrics.jsonl and the TensorBoard events.

    Args:
      folder: the workdir.
      step: updates applied so far; what an interrupted run recorded beyond it is dropped, since
        those steps are made again.
    """

    def __init__(self, folder: AnyPath, step: int):
        home = epath.Path(folder)
        self._outbox = Outbox(home)
        path = self._outbox.folder / "metrics.jsonl"
        again: list[dict[str, float]] = []
        if (home / "metrics.jsonl").exists():
            kept = [line for line in read_metrics(home) if line["step"] <= step]
            replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
            again = kept[-AGAIN:]
        self._lines: TextIO = path.open("a")
        first = int(again[0]["step"]) if again else step + 1
        self._events = SummaryWriter(str(self._outbox.folder / "tensorboard"), purge_step=first)
        for line in again:
            self._show(int(line["step"]), {k: v for k, v in line.items() if k != "step"})

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line: `metrics` after `step` updates."""
        self._lines.write(json.dumps({"step": step} | metrics) + "\n")
        self._lines.flush()
        self._show(step, metrics)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Returns when the lines so far are in the workdir, wherever it is.

        Raises:
          OSError: the workdir does not take them.
        """
        if self._outbox.is_copied:
            self._events.flush()
            self._outbox.flush()

    def close(self) -> None:
        """Flushes and closes the files.

        Raises:
          OSError: the workdir does not take them.
        """
        self._lines.close()
        self._events.close()
        self._outbox.close()


def read_metrics(folder: AnyPath) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a crash is left out.

    Raises:
      UserError: there is no such file.
    """
    path = epath.Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{folder} holds no run: there is no {path.name} in it")
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
