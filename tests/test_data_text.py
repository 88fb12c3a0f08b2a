"""Text: every byte scored exactly once, and windows as in plain NumPy."""

import jax
import numpy as np
import pytest

from rezero_jax.data import Text, TextSplit
from rezero_jax.data.order import SplitMix64
from rezero_jax.errors import UserError
from tests.data import load

# N, T and context: with and without a ragged end, one window, one byte scored at a time.
SHAPES = [(12, 4, 0), (14, 4, 0), (14, 4, 3), (51, 10, 5), (7, 7, 2), (9, 7, 6), (5, 1, 0)]


def random_text(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def examples(split: TextSplit, indices: np.ndarray, step: int = 0) -> dict[str, np.ndarray]:
    batch = jax.jit(split.gather)(dict(split.resident), split.fetch(indices, step))
    return {name: np.asarray(values) for name, values in batch.items()}


@pytest.mark.parametrize(("count", "length", "context"), SHAPES)
def test_evaluation_scores_every_byte_once_after_its_context(count, length, context):
    text = random_text(count)
    split = TextSplit(text, length, context, whole=True)
    indices = np.arange(split.size)
    starts, last = (split.fetch(indices)[name] for name in ("start", "last"))
    assert last[-1] == count
    batch = examples(split, indices)
    scored = np.zeros(count, int)
    for i, start in enumerate(starts):
        np.testing.assert_array_equal(batch["targets"][i], text[start : start + length])
        for place in np.flatnonzero(batch["weight"][i]):
            scored[start + place] += 1
            assert place >= min(context, start + place)
    np.testing.assert_array_equal(scored, 1)
    stride = length - context
    np.testing.assert_array_equal(batch["weight"].sum(axis=1)[:-1], stride)
    assert batch["weight"][-1].sum() == count - (split.size - 1) * stride
    assert batch["weight"].dtype == np.float32


@pytest.mark.parametrize("kind", ["segments", "random", "whole"])
def test_inputs_are_the_bytes_before_the_targets(kind):
    text = random_text(103)
    split = TextSplit(text, 8, 3 * (kind == "whole"), kind == "random", whole=kind == "whole")
    before = np.concatenate([[0], text])
    indices = np.arange(split.size)
    if kind == "segments":  # which tile the text without its ragged end
        assert split.fetch(indices)["start"].tolist() == list(range(0, 96, 8))
    for step in range(4 if kind == "random" else 1):
        start = split.fetch(indices, step)["start"]
        batch = examples(split, indices, step)
        assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
        for i, position in enumerate(start):
            np.testing.assert_array_equal(batch["tokens"][i], before[position : position + 8])
            np.testing.assert_array_equal(batch["targets"][i], text[position : position + 8])


def test_random_windows_are_a_function_of_seed_and_step_alone():
    text = random_text(1000)
    split = TextSplit(text, 10, random=True, seed=5)
    assert split.size == 100

    def start(split: TextSplit, indices: list[int], step: int) -> list[int]:
        return split.fetch(np.array(indices), step)["start"].tolist()

    assert start(split, [0, 1, 2, 3], 7) == start(split, [9, 9, 50, 0], 7)
    again = TextSplit(text, 10, random=True, seed=5)
    (fetched,) = again.batches(lambda step: np.arange(4), 7, 8)
    assert fetched["start"].tolist() == start(split, [0, 1, 2, 3], 7)
    assert len({tuple(start(split, [0] * 8, step)) for step in range(50)}) == 50
    other = TextSplit(text, 10, random=True, seed=6)
    assert start(other, [0] * 8, 7) != start(split, [0] * 8, 7)
    for step in range(3):  # not the numbers that shuffle the examples, see data.order
        shuffling = SplitMix64(5, step).integers(991, size=20)
        assert (start(split, [0] * 20, step) == shuffling).mean() < 0.2


def test_random_windows_never_change_and_start_everywhere_equally_often():
    split = TextSplit(random_text(1000), 10, random=True, seed=3)
    expected = [524, 345, 723, 198, 568, 295, 636, 111, 15, 702]
    assert split.fetch(np.arange(10), 7)["start"].tolist() == expected
    split = TextSplit(random_text(16), 5, random=True)
    draws = np.concatenate([split.fetch(np.zeros(3, int), step)["start"] for step in range(4000)])
    counts = np.bincount(draws)
    assert len(counts) == 12  # 0 .. 16 - 5
    # Chi-squared with 11 degrees of freedom: above 35 in fewer than 1 of 4,000 cases.
    assert ((counts - 1000) ** 2 / 1000).sum() < 35


def test_indices_outside_the_split_are_refused():
    text = random_text(12)
    for split in (TextSplit(text, 3), TextSplit(text, 4, 1, whole=True)):
        for indices in ([-1], [0, 4]):
            with pytest.raises(IndexError, match=r"0 \.\. 3"):
                split.fetch(np.array(indices))


def test_the_longest_text_can_be_indexed_and_a_longer_one_is_refused():
    longest = 2**31 - 2
    text = np.broadcast_to(np.uint8(0), longest)  # takes one byte of memory
    split = TextSplit(text, 1000, 999, whole=True)
    fetched = split.fetch(np.array([0, split.size - 1]))
    assert fetched["last"].tolist() == [1, longest]
    assert fetched["start"].tolist() == [0, longest - 1000]
    shapes = {"text": jax.ShapeDtypeStruct((longest + 1,), np.uint8)}
    assert jax.eval_shape(split.gather, shapes, fetched)["tokens"].shape == (2, 1000)
    with pytest.raises(UserError, match=r"the book has 2147483647 bytes; .* to 2147483646"):
        TextSplit(np.broadcast_to(np.uint8(0), longest + 1), 1000, name="the book")


def test_a_text_is_divided_into_90_5_and_5_percent(tmp_path):
    content = random_text(1019).tobytes()
    (tmp_path / "book").write_bytes(content)
    splits = {}
    assert not load("text", path=str(tmp_path / "book"), length=16).train.random
    for split in ("validation", "test"):
        fields = {"length": 16, "context": 4, "windows": "random", "eval_split": split}
        text = load("text", path=str(tmp_path / "book"), seed=4, **fields)
        assert isinstance(text, Text)
        assert (text.name, text.train.length, text.eval.length) == ("text", 16, 16)
        assert (text.eval.whole, text.eval.context, text.eval.random) == (True, 4, False)
        assert (text.train.whole, text.train.random, text.train.seed) == (False, True, 4)
        splits["train"], splits[split] = text.train.text.tobytes(), text.eval.text.tobytes()
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [917, 51, 51]
    assert splits["train"] + splits["validation"] + splits["test"] == content


def test_largest_is_of_both_splits(tmp_path):
    for place, largest in ((0, 200), (905, 200), (960, 65)):  # train, validation, test
        content = bytearray(b"A" * 1000)
        content[place] = 200
        (tmp_path / "book").write_bytes(content)
        assert load("text", path=str(tmp_path / "book"), length=8).largest == largest


def test_a_wrong_field_is_named_before_anything_is_read():
    for wrong, words in (
        ({"length": 8, "context": 8}, r"data.context=8 .* 0 \.\. 7"),
        ({"context": -1}, "data.context=-1"),
        ({"windows": "randum"}, 'data.windows .*"random"'),
        ({"eval_split": "train"}, "data.eval_split .* test, validation"),
    ):
        with pytest.raises(UserError, match=words):
            load("enwik8", **wrong)


def test_a_short_split_is_named(tmp_path):
    (tmp_path / "book").write_bytes(bytes(1000))
    fields = {"path": str(tmp_path / "book"), "length": 50}
    assert load("text", **fields).eval.size == 1
    for split, length, count in (("validation", 51, 50), ("test", 51, 50), ("train", 901, 900)):
        fields |= {"length": length, "eval_split": "test" if split == "test" else "validation"}
        with pytest.raises(UserError, match=f"{split} .* {count} bytes.* data.length={length}"):
            load("text", **fields)
