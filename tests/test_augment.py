"""Augmentation: against per-image NumPy and PIL, in distribution, and on several devices."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from rezero_jax.data.augment import Augmentation
from rezero_jax.errors import UserError
from rezero_jax.training.sharding import batched, place_devices, replicated

PAPER = Augmentation(crop_padding=4, flip=True, jitter=0.25, rotation=2.0)
KEY = jax.random.key(7)
ORDERS = list(itertools.permutations(range(3)))
Draws = dict[str, np.ndarray]


def images(batch: int, shape: tuple[int, ...] = (32, 32, 3), seed: int = 0) -> np.ndarray:
    """Images without black pixels, which only augmentation fills in."""
    return np.random.default_rng(seed).integers(1, 256, (batch, *shape), dtype=np.uint8)


jitted = functools.cache(lambda augmentation: jax.jit(augmentation.apply))  # one compilation each


def drawn(augmentation: Augmentation, batch: int, key: jax.Array = KEY) -> Draws:
    return {name: np.asarray(x) for name, x in augmentation.draw(key, batch).items()}


def applied(augmentation: Augmentation, image: np.ndarray, draws: Draws) -> np.ndarray:
    return np.asarray(jitted(augmentation)(image, draws))


def called(augmentation: Augmentation, image: np.ndarray, key: jax.Array = KEY) -> np.ndarray:
    return np.asarray(jax.jit(augmentation)(image, key))


def crop(image: np.ndarray, padding: int, corner: np.ndarray) -> np.ndarray:
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    row, column = corner
    return padded[row : row + height, column : column + width]


def jitter(image: np.ndarray, factors: np.ndarray, order: np.ndarray) -> np.ndarray:
    image = image.astype(np.float64)
    for kind in order:
        grey = image @ [0.299, 0.587, 0.114] if image.shape[-1] == 3 else image[..., 0]
        target = [0.0, grey.mean(), grey[..., None]][kind]
        image = np.clip(factors[kind] * image + (1 - factors[kind]) * target, 0, 255)
    return image


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
    turned = [plane.rotate(float(degrees), Image.Resampling.NEAREST) for plane in planes]
    return np.stack([np.asarray(plane) for plane in turned], axis=-1)


def reference(augmentation: Augmentation, image: np.ndarray, draws: Draws) -> np.ndarray:
    """One image after another, each change in the paper's order."""
    results = []
    for i, one in enumerate(image):
        if augmentation.crop_padding:
            one = crop(one, augmentation.crop_padding, draws["crop"][i])
        if augmentation.jitter:
            one = jitter(one, draws["factors"][i], draws["order"][i]).astype(np.float32)
        if augmentation.rotation:
            one = rotate(one, draws["angle"][i])
        if augmentation.flip and draws["flip"][i]:
            one = one[:, ::-1]
        results.append(one)
    return np.stack(results)


@pytest.mark.parametrize("shape", [(16, 16, 3), (9, 14, 1)])
@pytest.mark.parametrize(
    ("augmentation", "names"),
    [
        (Augmentation(crop_padding=20), {"crop"}),  # some crops miss the image
        (Augmentation(flip=True), {"flip"}),
        (Augmentation(rotation=40.0), {"angle"}),
        (Augmentation(jitter=0.6), {"factors", "order"}),
        (PAPER, {"crop", "flip", "angle", "factors", "order"}),
    ],
    ids=["crop", "flip", "rotation", "jitter", "all"],
)
def test_images_are_those_of_the_reference(augmentation, names, shape):
    image = images(64, shape)
    draws = drawn(augmentation, 64)
    assert draws.keys() == names
    if "flip" in names:  # the other changes do not change what is drawn
        np.testing.assert_array_equal(draws["flip"], drawn(PAPER, 64)["flip"])
    result = applied(augmentation, image, draws)
    assert result.dtype == (np.float32 if augmentation.jitter else np.uint8)
    # float32 against float64: some eps (6e-8) of 255 for each of three blends.
    atol = 5e-4 if augmentation.jitter else 0
    np.testing.assert_allclose(result, reference(augmentation, image, draws), rtol=0, atol=atol)


def test_jitter_is_pils_except_for_its_rounding():
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    image = images(48)
    factors = np.random.default_rng(2).uniform(0.75, 1.25, (48, 3)).astype(np.float32)
    orders = np.repeat(np.int32(ORDERS), 8, axis=0)
    result = applied(Augmentation(jitter=0.7), image, {"factors": factors, "order": orders})
    for one, f, order, ours in zip(image, factors, orders, result, strict=True):
        pil = Image.fromarray(one)
        for kind in order:
            pil = enhancers[kind](pil).enhance(float(f[kind]))
        # PIL truncates after each blend (up to 1) and rounds its target (0.5 * 0.25); an earlier
        # error grows at most 1.25 + 0.25 times: 1.125 * (1 + 1.5 + 1.5**2) = 5.3.
        assert np.abs(ours - np.asarray(pil, np.float32)).max() < 5.4


N = 60_000


def assert_uniform(values: np.ndarray, options: int) -> None:
    """Each of 0 .. options - 1 about equally often: five standard deviations."""
    counts = np.bincount(values, minlength=options)
    assert len(counts) == options
    p = 1 / options
    assert np.abs(counts - N * p).max() < 5 * np.sqrt(N * p * (1 - p))


def test_discrete_draws_are_equally_likely_and_all_draws_independent():
    draws = drawn(PAPER, N)
    row, column = draws["crop"].T
    order = np.array([ORDERS.index(tuple(one)) for one in draws["order"].tolist()])
    assert_uniform(row * 9 + column, 81)
    assert_uniform(order, 6)
    assert_uniform(draws["flip"].astype(int), 2)
    assert_uniform((row * 6 + order) * 2 + draws["flip"], 9 * 6 * 2)
    each = [row, column, order, draws["flip"], *draws["factors"].T, draws["angle"]]
    assert np.abs(np.corrcoef(each) - np.eye(8)).max() < 5 / np.sqrt(N)


def test_continuous_draws_are_uniform():
    for amount, low, high in ((0.25, 0.75, 1.25), (1.5, 0.0, 2.5)):
        draws = drawn(Augmentation(jitter=amount, rotation=amount), N)
        columns = [*draws["factors"].T, draws["angle"]]
        bounds = [(low, high)] * 3 + [(-amount, amount)]
        for values, (least, most) in zip(columns, bounds, strict=True):
            assert least <= values.min() <= values.max() <= most
            # Kolmogorov-Smirnov; 2.3 / sqrt(N) is exceeded by chance once in 20,000.
            rank = (np.sort(values.astype(np.float64)) - least) / (most - least)
            assert np.abs(rank - (np.arange(N) + 0.5) / N).max() < 2.3 / np.sqrt(N)


def test_the_key_and_the_place_in_the_batch_decide():
    image, others = images(64), images(64, seed=1)
    expected = called(PAPER, image)
    np.testing.assert_array_equal(expected, called(PAPER, image))
    other = called(PAPER, image, jax.random.fold_in(KEY, 1))
    assert (expected != other).any(axis=(1, 2, 3)).all()
    same = called(PAPER, np.repeat(images(1), 64, axis=0))
    assert len({one.tobytes() for one in same}) == 64
    for i in range(0, 64, 9):  # the other images of the batch do not count
        mixed = others.copy()
        mixed[i] = image[i]
        np.testing.assert_array_equal(called(PAPER, mixed)[i], expected[i])


@pytest.mark.devices(4)
def test_four_devices_make_the_images_of_one_without_talking():
    results = []
    for count in (1, 4):
        mesh = place_devices(jax.devices(), count, 1)
        image = jax.device_put(images(128), batched(mesh))
        key = jax.device_put(KEY, replicated(mesh))
        compiled = jax.jit(PAPER).lower(image, key).compile()
        assert not re.search(r"(all-|collective-)\w+\(", compiled.as_text())
        result = compiled(image, key)
        assert result.sharding.is_equivalent_to(batched(mesh), 4)
        results.append(np.asarray(result))
    np.testing.assert_array_equal(*results)


def test_impossible_values_are_refused():
    for name, value in (("crop_padding", 10**5), ("jitter", float("nan")), ("rotation", 1e5)):
        with pytest.raises(UserError, match=f"data.{name}={value}"):
            Augmentation(**{name: value})
    with pytest.raises(UserError, match=r"data\.jitter .*4"):
        jax.eval_shape(PAPER, jnp.asarray(images(2, (8, 8, 4))), KEY)
