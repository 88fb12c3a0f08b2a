"""Image data sets: facts about digits and CIFAR-10, standardising, names."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rezero_jax.data import NAMES, Dataset, Order, ResidentSplit, standardise
from rezero_jax.errors import UserError
from tests.data import load


def test_digits_are_the_scikit_learn_images() -> None:
    from sklearn.datasets import load_digits

    dataset = load("digits")
    train, held = dataset.train.resident, dataset.eval.resident
    assert (dataset.train.size, dataset.eval.size) == (1437, 360)
    assert dataset.example_shape == (8, 8, 1)
    assert dataset.num_classes == 10
    for part in (train, held):
        assert part["image"].dtype == np.uint8
        assert part["image"].shape[1:] == (8, 8, 1)
        assert part["label"].dtype == np.int32
        assert part["image"].min() == 0
        assert part["image"].max() == 255

    both = np.concatenate([train["image"], held["image"]])[..., 0]
    rows = np.rint(both * (16 / 255)).reshape(1797, 64)
    original = load_digits().data
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], original[np.lexsort(original.T)])
    histogram = np.bincount(train["label"]) + np.bincount(held["label"])
    np.testing.assert_array_equal(histogram, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])


def test_digits_split_is_fixed_and_has_the_same_mix_of_classes() -> None:
    one, other = load("digits"), load("digits")
    for a, b in ((one.train, other.train), (one.eval, other.eval)):
        np.testing.assert_array_equal(a.resident["image"], b.resident["image"])
    held = np.bincount(one.eval.resident["label"])
    total = held + np.bincount(one.train.resident["label"])
    assert np.all(np.abs(held - total / 5) <= 1)


def test_standardise_is_the_formula_for_any_leading_axes() -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 1.0)
    image = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    expected = (image / 255 - np.array(mean)) / np.array(std)
    actual = jax.jit(standardise, static_argnums=(1, 2))(image, mean, std)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_allclose(
        standardise(jnp.asarray(image[0, 0, 0, 0]), mean, std), expected[0, 0, 0, 0], atol=1e-6
    )


def test_half_maps_pixels_to_minus_one_and_one() -> None:
    black_white = jnp.array([[0], [255]], jnp.uint8)
    np.testing.assert_array_equal(standardise(black_white, (0.5,), (0.5,)), [[-1.0], [1.0]])


def test_mean_and_std_can_be_given() -> None:
    assert load("digits").mean == load("digits").std == (0.5,)
    dataset = load("digits", mean=(0.3,), std=(0.4,))
    assert (dataset.mean, dataset.std) == ((0.3,), (0.4,))
    with pytest.raises(UserError, match='std of "digits" has 3 values; give it 1'):
        load("digits", std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        (np.zeros((3, 8, 8, 1), np.float32), 0, "has images of float32; convert them to uint8"),
        (np.zeros((3, 8, 9, 1), np.uint8), 0, "has images of shape (8, 9, 1), but its example_"),
        (np.zeros((3, 8, 8), np.uint8), 0, "has images of shape (8, 8), but its example_shape is"),
        (np.zeros((3, 8, 8, 1), np.uint8), 10, "has the label 10, which is not in 0 .. 9; correct"),
        (np.zeros((3, 8, 8, 1), np.uint8), -1, "has the label -1, which is not in 0 .. 9; correct"),
        (np.zeros((3, 8, 8, 1), np.uint8), 9, None),
    ],
)
@pytest.mark.parametrize("part", ["train", "eval"])
def test_resident_examples_that_cannot_be_are_refused(
    part: str, image: np.ndarray, label: int, words: str | None
) -> None:
    fields: dict[str, Any] = vars(load("digits")) | {"name": "mine"}
    fields[part] = ResidentSplit({"image": image, "label": np.array([0, label, 0], np.int32)})
    if words is None:
        assert Dataset(**fields).name == "mine"
    else:
        with pytest.raises(UserError, match=re.escape(f'data set "mine" {words}')):
            Dataset(**fields)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(
        UserError, match=r'unknown data set "cifar".*did you mean "cifar10"'
    ) as info:
        load("cifar")
    assert all(name in str(info.value) for name in NAMES)


CIFAR10 = Path(os.environ.get("TFDS_DATA_DIR", ""), "cifar10", "3.0.2", "dataset_info.json")


@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ or not CIFAR10.exists(),
    reason="CIFAR-10 is not in the folder that TFDS_DATA_DIR names",
)
def test_cifar10_is_complete_and_streams_the_same_images() -> None:
    resident, stream = load("cifar10"), load("cifar10", stream=True)
    assert (resident.train.size, resident.eval.size) == (50_000, 10_000)
    assert (resident.example_shape, resident.num_classes) == ((32, 32, 3), 10)
    assert resident.mean == resident.std == (0.5, 0.5, 0.5)
    for one, other, each in (
        (resident.train, stream.train, 5000),
        (resident.eval, stream.eval, 1000),
    ):
        arrays = one.resident
        assert arrays["image"].shape == (10 * each, 32, 32, 3)
        np.testing.assert_array_equal(np.bincount(arrays["label"]), [each] * 10)
        assert other.size == one.size
        order = Order(seed=0, size=one.size, batch_size=100)
        for step, batch in enumerate(other.batches(order.indices, 7, 10), 7):
            for name in ("image", "label"):
                np.testing.assert_array_equal(batch[name], arrays[name][order.indices(step)])
