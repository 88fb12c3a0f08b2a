"""Streaming: random access and reading ahead give the same batches, from any step."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from rezero_jax.data import Order, ResidentSplit, StreamSplit, eval_batches
from rezero_jax.errors import UserError

SIZE = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (SIZE, 4, 4, 3), np.uint8)
LABELS = np.arange(SIZE, dtype=np.int32) % 10


class Memory:
    """Examples in memory, which remember how often and by which threads they were read."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.reads = 0

    def __len__(self) -> int:
        return SIZE

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        self.threads.add(threading.current_thread().name)
        self.reads += 1
        return [{"image": IMAGES[key], "label": int(LABELS[key])} for key in keys]


@pytest.mark.parametrize("first", [0, 1, 9, 1000])
def test_reading_ahead_gives_the_batches_of_the_order_from_any_step(first: int) -> None:
    split = StreamSplit(Memory(), threads=4, ahead=3)
    order = Order(seed=2, size=SIZE, batch_size=5)
    batches = list(split.batches(order.indices, first, first + 12))
    assert len(batches) == 12
    for step, batch in enumerate(batches, first):
        np.testing.assert_array_equal(batch["image"], IMAGES[order.indices(step)])
        np.testing.assert_array_equal(batch["label"], LABELS[order.indices(step)])


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 50), (0, 0)])
def test_the_number_of_workers_changes_nothing(threads: int, ahead: int) -> None:
    order = Order(seed=2, size=SIZE, batch_size=5)
    expected = StreamSplit(Memory()).batches(order.indices, 0, 10)
    actual = StreamSplit(Memory(), threads, ahead).batches(order.indices, 0, 10)
    for one, other in zip(expected, actual, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_workers_read_ahead_and_no_further() -> None:
    memory = Memory()
    batches = StreamSplit(memory, threads=2, ahead=4).batches(lambda step: np.arange(3), 0, 100)
    next(batches)
    batches.close()
    assert 1 <= memory.reads <= 1 + 4
    assert threading.current_thread().name not in memory.threads


def test_no_steps_is_no_batches() -> None:
    split = StreamSplit(Memory())
    assert list(split.batches(lambda step: np.arange(2), 5, 5)) == []


def test_an_error_in_a_worker_reaches_the_loop() -> None:
    split = StreamSplit(Memory())
    with pytest.raises(IndexError, match=f"0 .. {SIZE - 1}"):
        list(split.batches(lambda step: np.array([0, SIZE]), 0, 3))


def test_resident_and_stream_give_the_same_batch_inside_jit() -> None:
    stream = StreamSplit(Memory())
    resident = ResidentSplit({"image": IMAGES, "label": LABELS})
    order = Order(seed=7, size=SIZE, batch_size=6)
    assert stream.size == resident.size == SIZE
    assert stream.resident == {}
    for step in range(8):
        batches = []
        for split in (stream, resident):
            (fetched,) = split.batches(order.indices, step, step + 1)
            batches.append(jax.jit(split.gather)(dict(split.resident), fetched))
        for batch in batches:
            assert batch["image"].dtype == np.uint8
            assert batch["label"].dtype == np.int32
            np.testing.assert_array_equal(batch["image"], IMAGES[order.indices(step)])
            np.testing.assert_array_equal(batch["label"], LABELS[order.indices(step)])


def test_only_indices_travel_for_a_resident_split() -> None:
    resident = ResidentSplit({"image": IMAGES, "label": LABELS})
    fetched = resident.fetch(np.array([4, 2]))
    assert list(fetched) == ["index"]
    assert fetched["index"].dtype == np.int32


@pytest.mark.parametrize("indices", [[-1], [0, SIZE]])
def test_indices_outside_the_split_are_refused(indices: list[int]) -> None:
    for split in (StreamSplit(Memory()), ResidentSplit({"image": IMAGES, "label": LABELS})):
        with pytest.raises(IndexError, match="example indices"):
            split.fetch(np.array(indices))


def test_eval_batches_read_every_example_once() -> None:
    split = StreamSplit(Memory())
    indices, mask = eval_batches(SIZE, 6)
    labels = [
        batch["label"][keep]
        for batch, keep in zip(
            split.batches(indices.__getitem__, 0, len(indices)), mask, strict=True
        )
    ]
    np.testing.assert_array_equal(np.concatenate(labels), LABELS)


def test_pixels_may_depend_on_the_step_and_the_position() -> None:
    def shifted(image: np.ndarray, step: int, position: int) -> np.ndarray:
        return image + np.uint8(10 * step + position)

    split = StreamSplit(Memory(), pixels=shifted)
    order = Order(seed=2, size=SIZE, batch_size=5)
    shifts = np.arange(5, dtype=np.uint8)[:, None, None, None]
    for step, batch in enumerate(split.batches(order.indices, 3, 9), 3):
        expected = IMAGES[order.indices(step)] + shifts + np.uint8(10 * step)
        np.testing.assert_array_equal(batch["image"], expected)
        np.testing.assert_array_equal(split.fetch(order.indices(step), step)["image"], expected)


@pytest.mark.parametrize(("classes", "wrong"), [(10, None), (9, 9), (None, None)])
def test_streamed_labels_are_checked(classes: int | None, wrong: int | None) -> None:
    split = StreamSplit(Memory(), name="mine", num_classes=classes)
    batches = split.batches(lambda step: np.arange(7) + 7 * step, 0, 2)
    next(batches)
    if wrong is None:
        next(batches)
    else:
        with pytest.raises(UserError, match=r'"mine" has the label 9, which is not in 0 \.\. 8;'):
            next(batches)


def test_streamed_images_of_two_shapes_are_refused() -> None:
    def cut(image: np.ndarray, step: int, position: int) -> np.ndarray:
        return image[: 4 - position // 2]

    split = StreamSplit(Memory(), pixels=cut, name="mine")
    assert split.fetch(np.arange(2))["image"].shape == (2, 4, 4, 3)
    words = r'"mine" has images of shapes \(4, 4, 3\) and \(3, 4, 3\), which make no batch'
    with pytest.raises(UserError, match=words):
        split.fetch(np.arange(3))
