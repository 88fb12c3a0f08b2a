"""Stand-ins: the sizes of data sets that are not there, for plans."""

import socket
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rezero_jax.data import NAMES, Dataset, Order, ResidentSplit, StreamSplit, Text, stand_in
from rezero_jax.data.images import IMAGES
from rezero_jax.data.tfds.enwik8 import Enwik8
from rezero_jax.errors import UserError
from tests.data import section


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket can be opened, and nothing made where data and caches would lie."""
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def refused(*args: Any) -> None:
        raise AssertionError("a socket")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.parametrize("name", NAMES)
def test_no_data_is_needed_and_nothing_is_made(name: str, tmp_path: Path) -> None:
    tracemalloc.start()
    dataset = stand_in(section(name, str(tmp_path / "nowhere")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    assert (dataset is None) == (name in ("digits", "stdlib", "text"))
    assert not any(tmp_path.iterdir())
    if dataset is not None:
        assert dataset.name == name
        indices = Order(0, dataset.train.size, 4).indices(10**6)
        (batch,) = dataset.train.batches(lambda step: indices, 0, 1)
        assert all(len(values) == 4 for values in batch.values())


@pytest.mark.parametrize("name", [name for name in IMAGES if name != "imagenet"])
def test_image_sets_have_the_sizes_that_tfds_publishes(name: str) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder(name)
    dataset = stand_in(section(name))
    assert isinstance(dataset, Dataset)
    assert dataset.example_shape == builder.info.features["image"].shape
    assert dataset.num_classes == builder.info.features["label"].num_classes
    published = {"cifar": (50_000, 10_000), "svhn_": (73_257, 26_032)}.get(name[:5])
    assert (dataset.train.size, dataset.eval.size) == (published or (60_000, 10_000))
    for split in (dataset.train, dataset.eval):
        assert isinstance(split, ResidentSplit)
        assert split.resident["image"].shape == (split.size, *dataset.example_shape)
        assert split.resident["image"].dtype == np.uint8
        assert split.resident["label"].shape == (split.size,)
        assert split.resident["label"].dtype == np.int32


def test_a_streamed_set_stays_streamed_and_has_its_fields() -> None:
    dataset = stand_in(section("cifar10", stream=True, mean=(0.1, 0.2, 0.3)))
    assert isinstance(dataset, Dataset)
    assert isinstance(dataset.train, StreamSplit)
    assert dataset.train.resident == {}
    assert dataset.train.fetch(np.arange(2))["image"].shape == (2, 32, 32, 3)
    assert dataset.mean == (0.1, 0.2, 0.3)


def test_imagenet_has_the_size_of_the_config() -> None:
    dataset = stand_in(section("imagenet", image_size=96))
    assert isinstance(dataset, Dataset)
    assert (dataset.train.size, dataset.eval.size) == (1_281_167, 50_000)
    assert (dataset.example_shape, dataset.num_classes) == ((96, 96, 3), 1000)
    batch = dataset.eval.fetch(np.arange(3))
    assert batch["image"].shape == (3, 96, 96, 3)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_enwik8_has_its_splits_and_the_windows_of_the_config(part: str) -> None:
    text = stand_in(section("enwik8", length=512, context=12, eval_split=part, windows="random"))
    assert isinstance(text, Text)
    assert len(text.train.text) == Enwik8.SIZES["train"]
    assert len(text.eval.text) == Enwik8.SIZES[part]
    assert (text.train.size, text.train.random) == (90_000_000 // 512, True)
    assert (text.eval.size, text.eval.context) == (5_000_000 // 500, 12)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("cifar", {}, 'unknown data set "cifar"; did you mean "cifar10"'),
        ("imagenet", {"image_size": 0}, "image_size=0 is not positive"),
        ("mnist", {"std": (1.0, 1.0, 1.0)}, 'std of "mnist" has 3 values; give it 1'),
        ("enwik8", {"context": 256}, "data.context=256 is not in 0 .. 255"),
    ],
)
def test_what_load_refuses_a_stand_in_refuses(name: str, wrong: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        stand_in(section(name, **wrong))


def test_tensorflow_is_not_imported() -> None:
    assert "tensorflow" not in sys.modules
