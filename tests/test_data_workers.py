"""Worker processes: the same batches as without them, and no trace of them after the run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rezero_jax.data import Order, StreamSplit

SIZE = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (SIZE, 4, 4, 3), np.uint8)
ORDER = Order(seed=2, size=SIZE, batch_size=6)


class Memory:
    """Examples in memory."""

    def __len__(self) -> int:
        return SIZE

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": IMAGES[key], "label": int(key)} for key in keys]


def shifted(image: np.ndarray, step: int, position: int) -> np.ndarray:
    return image + np.uint8(10 * step + position)


def where(image: np.ndarray, step: int, position: int) -> np.ndarray:
    """The process that decodes, and whether it is kept from accelerators."""
    kept = os.environ.get("JAX_PLATFORMS") == "cpu" and not jax._src.xla_bridge._backends
    return np.frombuffer(os.getpid().to_bytes(3, "big") + bytes([kept]), np.uint8).reshape(1, 1, 4)


def test_batches_are_the_same_for_any_number_of_workers_and_processes() -> None:
    """From the middle on, as a resumed run reads them, whole and for each of two processes."""
    whole = StreamSplit(Memory(), pixels=shifted)
    expected = [whole.fetch(ORDER.indices(step), step) for step in range(3, 9)]
    halves = (slice(0, 3), slice(3, 6))
    for workers, parts in ((0, halves), (2, (slice(None),)), (1, halves)):
        split = StreamSplit(Memory(), pixels=shifted, workers=workers)
        batches = [list(split.batches(ORDER.indices, 3, 9, rows)) for rows in parts]
        for *found, want in zip(*batches, expected, strict=True):
            both = {name: np.concatenate([part[name] for part in found]) for name in want}
            jax.tree.map(np.testing.assert_array_equal, both, want)


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_loop() -> None:
    with pytest.raises(IndexError, match=f"0 .. {SIZE - 1}"):
        list(StreamSplit(Memory(), workers=1).batches(lambda step: np.array([SIZE]), 0, 3))


def test_workers_use_no_device_hear_no_signal_and_end_with_the_run() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for _ in range(2):  # while they start, and while they work
                assert process.stdout.readline() == "reading\n"
                time.sleep(0.5)
                for signum in (signal.SIGINT, signal.SIGTERM):
                    os.killpg(process.pid, signum)  # as a terminal or a job sends it
            pids = [int(word) for word in process.stdout.readline().split()]
            assert len(set(pids) - {process.pid}) == 2
            assert all(is_running(pid) for pid in pids)
            assert process.stdout.readline() == "no device\n"
        finally:
            process.kill()
        _, said = process.communicate(timeout=60)  # which ends with the last that could write
    assert "Traceback" not in said
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _read_for_ever() -> None:
    """Two workers, in a process that survives a SIGINT or SIGTERM."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    print("reading", flush=True)
    batches = StreamSplit(Memory(), pixels=where, workers=2).batches(ORDER.indices, 0, 10**6)
    next(batches)
    print("reading", flush=True)
    time.sleep(1.0)
    seen = [next(batches)["image"][0].tobytes() for _ in range(200)]
    print(*{int.from_bytes(image[:3], "big") for image in seen}, flush=True)
    print("no device" if all(image[3] for image in seen) else "a device", flush=True)
    for _ in batches:
        time.sleep(0.1)


if __name__ == "__main__":
    _read_for_ever()
