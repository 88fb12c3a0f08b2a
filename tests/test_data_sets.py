"""Image data sets: digits, CIFAR-10, standardising, names; and stand-ins of all data sets."""

import re
import socket
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rezero_jax.data import NAMES, Dataset, Order, ResidentSplit, Text, stand_in, standardise
from rezero_jax.data.datasets import IMAGES
from rezero_jax.errors import UserError
from tests.data import load, section


def test_digits_are_the_scikit_learn_images_and_every_fifth_of_a_class_is_held_out():
    from sklearn.datasets import load_digits

    dataset = load("digits")
    train, held = dataset.train.arrays, dataset.eval.arrays
    assert (dataset.train.size, dataset.eval.size) == (1437, 360)
    assert (dataset.example_shape, dataset.num_classes) == ((8, 8, 1), 10)
    for split in (train, held):
        assert (split["image"].dtype, split["label"].dtype) == (np.uint8, np.int32)
        assert (split["image"].min(), split["image"].max()) == (0, 255)
    both = np.concatenate([train["image"], held["image"]])[..., 0]
    rows = np.rint(both * (16 / 255)).reshape(1797, 64)
    original = load_digits().data
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], original[np.lexsort(original.T)])
    total = np.bincount(train["label"]) + np.bincount(held["label"])
    np.testing.assert_array_equal(total, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert np.all(np.abs(np.bincount(held["label"]) - total / 5) <= 1)


def test_standardise_is_the_formula_for_any_leading_axes():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 1.0)
    image = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    expected = (image / 255 - np.array(mean)) / np.array(std)
    actual = jax.jit(standardise, static_argnums=(1, 2))(image, mean, std)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    black_white = jnp.array([[0], [255]], jnp.uint8)
    np.testing.assert_array_equal(standardise(black_white, (0.5,), (0.5,)), [[-1.0], [1.0]])


def test_mean_and_std_can_be_given():
    assert load("digits").mean == load("digits").std == (0.5,)
    dataset = load("digits", mean=(0.3,), std=(0.4,))
    assert (dataset.mean, dataset.std) == ((0.3,), (0.4,))
    for field, values in (("std", (0.5, 0.5)), ("mean", (0.5, 0.5)), ("std", (0.0,))):
        with pytest.raises(UserError, match=f"data.{field}"):
            load("digits", **{field: values})


def test_resident_examples_that_cannot_be_are_refused():
    digits: dict[str, Any] = vars(load("digits")) | {"name": "mine"}
    for image, label, words in (
        (np.zeros((3, 8, 8, 1), np.float32), 0, "images of float32"),
        (np.zeros((3, 8, 9, 1), np.uint8), 0, "images of uint8 (8, 9, 1)"),
        (np.zeros((3, 8, 8), np.uint8), 0, "images of uint8 (8, 8)"),
        (np.zeros((3, 8, 8, 1), np.uint8), 10, "the label 10"),
        (np.zeros((3, 8, 8, 1), np.uint8), -1, "the label -1"),
    ):
        split = ResidentSplit({"image": image, "label": np.array([0, label, 0], np.int32)})
        for name in ("train", "eval"):
            with pytest.raises(UserError, match=re.escape(f'data set "mine" has {words}')):
                Dataset(**(digits | {name: split}))


@pytest.fixture
def nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket can be opened, and folders of data and caches are empty ones."""
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def refused(*args: Any) -> None:
        raise AssertionError("a socket")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.usefixtures("nothing_outside")
def test_a_stand_in_needs_no_data_and_makes_nothing(tmp_path):
    for name in NAMES:
        tracemalloc.start()
        dataset = stand_in(section(name, str(tmp_path / "nowhere")))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10e6
        assert (dataset is None) == (name in ("digits", "images", "stdlib", "text"))
        assert not any(tmp_path.iterdir())
        if dataset is not None:
            assert dataset.name == name
            indices = Order(0, dataset.train.size, 4).indices(10**6)
            (batch,) = dataset.train.batches(lambda step, indices=indices: indices, 0, 1)
            assert all(len(values) == 4 for values in batch.values())


@pytest.mark.usefixtures("nothing_outside")
def test_stand_ins_have_the_sizes_that_tfds_publishes_and_the_fields_of_the_config():
    import tensorflow_datasets as tfds

    for name in IMAGES.keys() - {"digits", "imagenet"}:
        features = tfds.builder(name).info.features
        dataset = stand_in(section(name))
        assert isinstance(dataset, Dataset)
        assert dataset.example_shape == features["image"].shape
        assert dataset.num_classes == features["label"].num_classes
        published = {"cifar": (50_000, 10_000), "svhn_": (73_257, 26_032)}.get(name[:5])
        assert (dataset.train.size, dataset.eval.size) == (published or (60_000, 10_000))
        assert isinstance(dataset.train, ResidentSplit)
    assert "tensorflow" not in sys.modules
    dataset = stand_in(section("cifar10", stream=True, mean=(0.1, 0.2, 0.3)))
    assert isinstance(dataset, Dataset)
    assert dataset.train.resident == {}
    assert dataset.train.fetch(np.arange(2))["image"].shape == (2, 32, 32, 3)
    assert dataset.mean == (0.1, 0.2, 0.3)
    dataset = stand_in(section("imagenet", image_size=96))
    assert isinstance(dataset, Dataset)
    assert (dataset.train.size, dataset.eval.size) == (1_281_167, 50_000)
    assert (dataset.example_shape, dataset.num_classes) == ((96, 96, 3), 1000)
    assert dataset.eval.fetch(np.arange(3))["image"].shape == (3, 96, 96, 3)
    with pytest.raises(UserError, match=r"data\.image_size=0"):
        stand_in(section("imagenet", image_size=0))
    text = stand_in(section("enwik8", length=512, context=12, eval_split="test", windows="random"))
    assert isinstance(text, Text)
    assert (len(text.train.text), len(text.eval.text)) == (90_000_000, 5_000_000)
    assert (text.train.size, text.train.random) == (90_000_000 // 512, True)
    assert (text.eval.size, text.eval.context) == (5_000_000 // 500, 12)
