"""Metrics of a run: one line of metrics.jsonl per logged step, and TensorBoard events."""

import contextlib
import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from rezero_jax import processes
from rezero_jax.errors import UserError
from rezero_jax.runs.files import (
    MOST,
    AnyPath,
    Upload,
    broken,
    is_bucket,
    open_file,
    path_of,
    replace_file,
    writing,
)

FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes metrics.jsonl and the TensorBoard events; errors of the workdir are UserErrors.

    The files have each line when `write` returns. TensorBoard's own writer would lose the last
    lines when it is killed, and would wait forever for its thread once the disk is full.

    Lines after `step`, the updates applied so far, are dropped, because a resumed run makes these
    updates again. `check` is called before each copy, see `Upload`.
    """

    def __init__(self, folder: AnyPath, step: int, check: Callable[[], None] = lambda: None):
        self._home = home = path_of(folder)
        lines = read_metrics(home) if (home / FILE).exists() else []
        with writing(home), contextlib.ExitStack() as files:
            self._upload = Upload(home, check)
            files.callback(self._upload.close)
            path, events = self._upload.folder / FILE, self._upload.folder / "tensorboard"
            replace_file(path, "".join(_text(line) for line in lines if line["step"] <= step))
            self._lines = files.enter_context(path.open("a"))
            events.mkdir(exist_ok=True)
            stamp = max([int(time.time()), *_next_stamps(home / "tensorboard")])
            path = events / f"events.out.tfevents.{stamp:010d}"
            self._events = files.enter_context(path.open("xb"))  # follows no link
            self._record(file_version="brain.Event:2")
            # TensorBoard hides what earlier starts wrote of these steps.
            self._record(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._files = files.pop_all()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics after `step` updates; in a bucket, they arrive with the next copy."""
        with writing(self._home):
            self._lines.write(_text({"step": step} | metrics))
            self._lines.flush()
            values = [Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
            self._record(step=step, summary=Summary(value=values))
        if self._upload.is_due():
            self.flush()

    def _record(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields).SerializeToString()
        for part in (struct.pack("<Q", len(event)), event):
            self._events.write(part + struct.pack("<I", masked_crc32c(part)))
        self._events.flush()

    def flush(self) -> None:
        """Returns when the workdir has all lines."""
        with writing(self._home):
            self._upload.flush()

    def close(self) -> None:
        """Closes the files."""
        with writing(self._home):
            self._files.close()


def _text(line: dict[str, float]) -> str:
    return json.dumps(line) + "\n"


def _next_stamps(folder: Any) -> list[int]:
    """TensorBoard reads files in the order of these times, and a clock may go backward."""
    names = " ".join(path.name for path in folder.iterdir()) if folder.is_dir() else ""
    return [int(stamp) + 1 for stamp in re.findall(r"tfevents\.(\d{1,18})", names)]


def read_metrics(
    folder: AnyPath, warn: Callable[[str], None] = processes.warn
) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl, without a last line that a crash truncated.

    Calls `warn` with a sentence if other lines are broken, and leaves them out. Raises a UserError
    if the file is missing or cannot be read.
    """
    path = path_of(folder) / FILE
    if not path.exists():
        raise UserError(f"{folder} holds no run: it has no {path.name}; train there first")
    lines, wrong = [], []
    try:
        for number, text in enumerate(_texts(path), 1):
            if (line := _parsed(text)) is not None:
                lines.append(line)
            elif text.endswith(b"\n"):
                wrong.append(number)
    except OSError as error:
        raise broken(path, error.strerror or str(error)) from None
    if wrong:
        warn(f"{path} has {len(wrong)} broken line(s), which are left out (line {wrong[0]} first)")
    return lines


def _texts(path: Any) -> Iterator[bytes]:
    """The lines of a file; on a disk, one that is longer than MOST raises an OSError."""
    if is_bucket(path):
        yield from path.read_bytes().splitlines(keepends=True)
        return
    with open(open_file(path), "rb") as file:
        while text := file.readline(MOST):
            if len(text) == MOST:
                raise OSError(f"it has a line of more than {MOST:,} bytes")
            yield text


def _parsed(text: bytes) -> dict[str, float] | None:
    """The numbers by name in a line of metrics.jsonl; None if it is another line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    is_sound = (type(v) is float or (type(v) is int and abs(v) < 2**63) for v in line.values())
    return line if all(is_sound) else None
