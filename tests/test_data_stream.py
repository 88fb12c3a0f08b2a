"""Streaming by threads and worker processes gives the same batches, from any step."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rezero_jax.data import Dataset, Order, ResidentSplit, StreamSplit
from rezero_jax.errors import UserError

SIZE = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (SIZE, 4, 4, 3), np.uint8)
LABELS = np.arange(SIZE, dtype=np.int32) % 10
ORDER = Order(seed=2, size=SIZE, batch_size=6)


class Memory:
    """Examples in memory, and how often and by which threads they were read."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.reads = 0

    def __len__(self) -> int:
        return SIZE

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        self.threads.add(threading.current_thread().name)
        self.reads += 1
        return [{"image": IMAGES[key], "label": int(LABELS[key])} for key in keys]


def shifted(image: np.ndarray, step: int, position: int) -> np.ndarray:
    return image + np.uint8((10 * step + position) % 256)


def process(image: np.ndarray, step: int, position: int) -> np.ndarray:
    """The process that decodes, and whether accelerators are hidden from it."""
    hidden = os.environ.get("JAX_PLATFORMS") == "cpu" and not jax._src.xla_bridge._backends
    pixels = os.getpid().to_bytes(3, "big") + bytes([hidden])
    return np.frombuffer(pixels, np.uint8).reshape(1, 1, 4)


def test_threads_give_the_batches_of_the_order_from_any_step():
    for first, threads, ahead in ((0, 4, 3), (9, 1, 1), (1, 2, 50), (1000, 0, 0)):
        split = StreamSplit(Memory(), threads, ahead, pixels=shifted)
        batches = list(split.batches(ORDER.indices, first, first + 9))
        assert len(batches) == 9
        for step, batch in enumerate(batches, first):
            indices = ORDER.indices(step)
            shifts = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.uint8(10 * step % 256)
            expected = {"image": IMAGES[indices] + shifts, "label": LABELS[indices]}
            jax.tree.map(np.testing.assert_array_equal, batch, expected)
            jax.tree.map(np.testing.assert_array_equal, split.fetch(indices, step), expected)
    assert list(split.batches(ORDER.indices, 5, 5)) == []


@pytest.mark.parametrize(("workers", "count"), [(0, 2), (2, 1)])
def test_batches_are_the_same_for_any_number_of_workers_and_processes(workers, count):
    """From the middle on, as a resumed run reads them, by one process or two."""
    whole = StreamSplit(Memory(), pixels=shifted)
    expected = [whole.fetch(ORDER.indices(step), step) for step in range(3, 9)]
    split = StreamSplit(Memory(), pixels=shifted, workers=workers)
    batches = [
        list(split.batches(ORDER.indices, 3, 9, rows)) for rows in np.split(np.arange(6), count)
    ]
    for *found, want in zip(*batches, expected, strict=True):
        together = {name: np.concatenate([one[name] for one in found]) for name in want}
        jax.tree.map(np.testing.assert_array_equal, together, want)


def test_threads_read_ahead_and_no_further():
    memory = Memory()
    batches = StreamSplit(memory, threads=2, ahead=4).batches(ORDER.indices, 0, 100)
    next(batches)
    batches.close()
    assert 1 <= memory.reads <= 1 + 4
    assert threading.current_thread().name not in memory.threads


def test_an_error_in_a_worker_reaches_the_loop():
    split = StreamSplit(Memory())
    with pytest.raises(IndexError, match=f"0 .. {SIZE - 1}"):
        list(split.batches(lambda step: np.array([0, SIZE]), 0, 3))


def test_resident_and_stream_give_the_same_batch_inside_jit():
    stream, resident = StreamSplit(Memory()), ResidentSplit({"image": IMAGES, "label": LABELS})
    assert stream.size == resident.size == SIZE
    assert stream.resident == {}
    assert list(resident.fetch(np.arange(2))) == ["index"]  # only indices travel
    for split in (stream, resident):
        gather = jax.jit(split.gather)
        for step, fetched in enumerate(split.batches(ORDER.indices, 0, 8)):
            batch = gather(dict(split.resident), fetched)
            assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
            np.testing.assert_array_equal(batch["image"], IMAGES[ORDER.indices(step)])
            np.testing.assert_array_equal(batch["label"], LABELS[ORDER.indices(step)])
        with pytest.raises(IndexError, match="example indices"):
            split.fetch(np.array([-1]))


def test_a_data_set_checks_streamed_examples_like_resident_ones():
    """Each image and label, by the data set's own shape and number of classes."""
    for pixels, shape, classes, words in (
        (shifted, (4, 4, 1), 10, r"uint8 \(4, 4, 3\), not uint8 \(4, 4, 1\)"),
        (lambda image, *_: image / 255, (4, 4, 3), 10, r"float64 \(4, 4, 3\), not uint8"),
        (shifted, (4, 4, 3), 9, "label 9, .* 0 .. 8"),
        (lambda image, _, position: image[: 4 - position // 2], (4, 4, 3), 10, r"\(3, 4, 3\)"),
    ):
        split = StreamSplit(Memory(), pixels=pixels)
        half = (0.5,) * shape[-1]
        dataset = Dataset("mine", split, split, shape, classes, half, half)
        for part in (dataset.train, dataset.eval):
            with pytest.raises(UserError, match=f'"mine" .*{words}'):
                list(part.batches(lambda step: np.arange(SIZE), 0, 1))


def test_workers_use_no_device_ignore_signals_and_end_with_the_run():
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        try:
            for _ in range(2):  # while the workers start, and while they work
                assert run.stdout.readline() == "reading\n"
                time.sleep(0.5)
                for signum in (signal.SIGINT, signal.SIGTERM):
                    os.killpg(run.pid, signum)  # as a terminal or a job sends it
            pids = [int(word) for word in run.stdout.readline().split()]
            assert len(set(pids) - {run.pid}) == 2
            assert all(is_running(pid) for pid in pids)
            assert run.stdout.readline() == "no device\n"
        finally:
            run.kill()
        _, said = run.communicate(timeout=60)  # ends with the last process that could write
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
    batches = StreamSplit(Memory(), pixels=process, workers=2).batches(ORDER.indices, 0, 10**6)
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
