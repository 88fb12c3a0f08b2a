"""What two runs left behind, compared to the bit, times apart."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.metrics import read_metrics


def is_time(key: str) -> bool:
    """Whether a value of the record says how long something took, which no two runs share."""
    times = ("seconds", "goodput", "examples_per_second", "mfu", "time")
    return key in times or key.startswith("time/")


def _without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not is_time(key)}


def metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [_without_times(line) for line in read_metrics(workdir)]


def events(folder: epath.Path) -> Iterator[Event]:
    """The events in TensorBoard's record files, in order of writing."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 12 + length + 4 > len(data):
                break  # cut off by a crash
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(folder: epath.Path) -> dict[tuple[int, str], float]:
    """{(step, name): value}, as TensorBoard shows it: a restart hides later steps seen before."""
    found: dict[tuple[int, str], float] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            found = {key: value for key, value in found.items() if key[0] < event.step}
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
    return found


def final(workdir: epath.Path) -> dict[str, Any]:
    """The content of final.json."""
    return _without_times(json.loads((workdir / "final.json").read_text()))


def saved(workdir: epath.Path, step: int) -> dict[str, np.ndarray]:
    """{path: array} of a checkpoint, read without the model, on whatever devices."""
    folder = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(folder, restore_args=as_numpy)
    return by_path(state)


def by_path(state: Any) -> dict[str, np.ndarray]:
    """{path: array} of a tree."""
    flat = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def changed_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """The paths under which not the same bits lie."""

    def bits(array: np.ndarray | None) -> tuple | None:
        return None if array is None else (array.dtype, array.shape, array.tobytes())

    return [path for path in sorted(a.keys() | b.keys()) if bits(a.get(path)) != bits(b.get(path))]


def progress(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The loop's own sums, as saved beside the state."""
    record = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return _without_times(json.loads(record.read_text())["progress"])


def differences(one: epath.Path, other: epath.Path) -> list[str]:
    """What two finished runs do not share: their story, checkpoints kept, state at the end."""
    found = []
    if _text(final(one)) != _text(final(other)):
        found.append("final.json")
    a, b = metrics(one), metrics(other)
    if len(a) != len(b):
        found.append(f"metrics.jsonl ({len(a)} lines, {len(b)} lines)")
    else:
        found += [
            f"metrics.jsonl, step {x['step']}"
            for x, y in zip(a, b, strict=True)
            if _text(x) != _text(y)
        ]
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
