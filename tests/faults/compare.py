"""Compares what two runs left behind, to the bit, except for times."""

import json
import struct
import threading
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.metrics import read_metrics
from tests.families import flat

ORBAX = threading.Lock()  # one thread at a time may use Orbax


def is_time(key: str) -> bool:
    """Whether a value of the record states how long something took, which differs between runs."""
    times = ("seconds", "goodput", "examples_per_second", "mfu", "time")
    return key in times or key.startswith("time/")


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not is_time(key)}


def metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl."""
    return [without_times(line) for line in read_metrics(workdir)]


def scalars(folder: epath.Path) -> dict[tuple[int, str], float]:
    """{(step, name): value} as TensorBoard shows them: a restart hides later steps seen before."""
    found: dict[tuple[int, str], float] = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):  # length, its checksum, the event, its checksum
            end = at + 12 + struct.unpack_from("<Q", data, at)[0]
            if end + 4 > len(data):
                break  # truncated by a crash
            event, at = Event.FromString(data[at + 12 : end]), end + 4
            if event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                found[event.step, value.tag] = value.simple_value
    return found


def final(workdir: epath.Path) -> dict[str, Any]:
    """The content of final.json."""
    return without_times(json.loads((workdir / "final.json").read_text()))


def saved(workdir: epath.Path, step: int) -> dict[str, np.ndarray]:
    """{path: array} of a checkpoint, read without the model, on any devices."""
    folder = workdir / "checkpoints" / str(step) / "state"
    with ORBAX, ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return flat(checkpointer.restore(folder, restore_args=as_numpy))


def changed_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Paths of the arrays that differ in a bit, their dtype or their shape."""

    def bits(array: np.ndarray | None) -> tuple | None:
        return None if array is None else (array.dtype, array.shape, array.tobytes())

    return [path for path in sorted(a.keys() | b.keys()) if bits(a.get(path)) != bits(b.get(path))]


def progress(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The loop's own sums, as saved beside the state."""
    record = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return without_times(json.loads(record.read_text())["progress"])


def differences(one: epath.Path, other: epath.Path) -> list[str]:
    """Differences between two finished runs: their records, checkpoints kept, and last states."""
    found = []
    if _text(final(one)) != _text(final(other)):
        found.append("final.json")
    a, b = metrics(one), metrics(other)
    if len(a) != len(b):
        found.append(f"metrics.jsonl ({len(a)} lines, {len(b)} lines)")
    else:
        pairs = zip(a, b, strict=True)
        found += [f"metrics.jsonl, step {x['step']}" for x, y in pairs if _text(x) != _text(y)]
    c, d = (
        {k: v for k, v in scalars(w / "tensorboard").items() if not is_time(k[1])}
        for w in (one, other)
    )
    if c != d:
        missing, extra = len(d.keys() - c.keys()), len(c.keys() - d.keys())
        found.append(f"tensorboard ({missing} scalars missing, {extra} too many)")
    kept_a, kept_b = (
        sorted(path.name for path in (w / "checkpoints").iterdir()) for w in (one, other)
    )
    if kept_a != kept_b:
        found.append(f"checkpoints kept ({kept_a}, {kept_b})")
    last = saved_steps(other)[-1]
    if last not in saved_steps(one):
        return found
    found += [f"state {path}" for path in changed_arrays(saved(one, last), saved(other, last))]
    if _text(progress(one, last)) != _text(progress(other, last)):
        found.append("saved progress")
    return found


def _text(values: Any) -> str:
    """Equal for equal bits: JSON writes the shortest text that reads as the same float."""
    return json.dumps(values, sort_keys=True)
