"""Loads data sets by name, and makes stand-ins of their sizes."""

import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rezero_jax.data.split import Dataset, ResidentSplit, Split
from rezero_jax.data.stream import StreamSplit
from rezero_jax.data.text import TEXT_NAMES, Text, load_text
from rezero_jax.data.text_files import ENWIK8_BYTES
from rezero_jax.data.tfds.imagenet import MEAN, STD, Crop
from rezero_jax.data.tfds.prepare import prepared_builder
from rezero_jax.data.tfds.source import TfdsSource, cached_arrays
from rezero_jax.errors import UserError, choose_from

# {image data set: ((training examples, evaluation examples), shape of an image, classes)}.
IMAGES = {
    "digits": ((1_437, 360), (8, 8, 1), 10),
    "cifar10": ((50_000, 10_000), (32, 32, 3), 10),
    "cifar100": ((50_000, 10_000), (32, 32, 3), 100),
    "fashion_mnist": ((60_000, 10_000), (28, 28, 1), 10),
    "mnist": ((60_000, 10_000), (28, 28, 1), 10),
    "svhn_cropped": ((73_257, 26_032), (32, 32, 3), 10),
    "imagenet": ((1_281_167, 50_000), (224, 224, 3), 1000),  # in the usual size
}
NAMES = (*IMAGES, *TEXT_NAMES)
OF_USERS = ("text",)  # read from data.path


def load(config: ConfigDict, seed: int = 0, download: bool = True) -> Dataset | Text:
    """Loads the data set that config.data names.

    "digits" and "stdlib" come with Python packages; "text" is the user's.

    Args:
      config: config.data.
      seed: determines, with the number of the update, random crops ("imagenet") and windows (text).
      download: whether to download and prepare other data sets on first use.

    Raises:
      UserError: a field is invalid, or the data set cannot be read or downloaded.
    """
    _check(config)
    if config.name in TEXT_NAMES:
        return load_text(config, seed, download=download)
    return digits(config) if config.name == "digits" else tfds_images(config, seed, download)


def stand_in(config: ConfigDict) -> Dataset | Text | None:
    """Zeros in the sizes of the data set that config.data names, for plans.

    This needs neither a download nor memory. Returns None for "digits", "stdlib" and "text", which
    need no download.

    Raises:
      UserError: a field is invalid.
    """
    _check(config)
    if config.name == "enwik8":
        return load_text(config, text=np.broadcast_to(np.uint8(0), ENWIK8_BYTES))
    if config.name in ("digits", *TEXT_NAMES):
        return None
    shape = _example_shape(config)

    def split(size: int) -> Split:
        if config.stream or config.name == "imagenet":
            return StreamSplit(_Zeros(size, shape))
        image, label = np.broadcast_to(np.uint8(0), (size, *shape)), np.zeros(size, np.int32)
        return ResidentSplit({"image": image, "label": label})

    return _dataset(config, *map(split, IMAGES[config.name][0]))


def digits(config: ConfigDict) -> Dataset:
    """scikit-learn's 1,797 handwritten digits; every fifth digit of a class is for evaluation."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    image = np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None]  # from 0 .. 16
    label = loaded.target.astype(np.int32)
    held_out = np.zeros(len(label), bool)
    held_out[np.argsort(label, kind="stable")[::5]] = True
    parts = (~held_out, held_out)
    splits = (ResidentSplit({"image": image[part], "label": label[part]}) for part in parts)
    return _dataset(config, *splits)


def tfds_images(config: ConfigDict, seed: int, download: bool = True) -> Dataset:
    """Loads the image data set that config.data names from TFDS.

    Images are decoded once, cached on disk and kept on the device, or, with config.stream, decoded
    for each batch; the batches are equal. "imagenet" is always streamed, as random crops for
    training and central crops for evaluation.
    """
    name, imagenet = config.name, config.name == "imagenet"
    builder = prepared_builder("imagenet2012" if imagenet else name, config.dir, download)
    threads = min(16 if imagenet else 8, os.cpu_count() or 1)

    def split(part: str, pixels: Callable[[Any, int, int], np.ndarray], workers: int = 0) -> Split:
        source, classes = TfdsSource(builder, part), IMAGES[name][2]
        streamed = StreamSplit(source, threads, 16, pixels, name, classes, workers)
        if config.stream or imagenet:
            return streamed
        return ResidentSplit(cached_arrays(f"{name}/{part}-{source.fingerprint()}", streamed))

    if imagenet:
        train = split("train", Crop(config.image_size, seed), config.workers)
        held = split("validation", Crop(config.image_size))
    else:
        train, held = split("train", decode, config.workers), split("test", decode)
    return _dataset(config, train, held)


def decode(encoded: bytes, step: int = 0, position: int = 0) -> np.ndarray:
    """The pixels of an encoded image, uint8 (H, W, C); see stream.StreamSplit."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.atleast_3d(np.asarray(image))


def _check(config: ConfigDict) -> None:
    if config.name not in NAMES:
        raise choose_from("data set", config.name, NAMES)
    for field, low, high in (("workers", 0, 1024), ("image_size", 1, 10_000)):
        value = config[field]
        if not low <= value <= high:
            raise UserError(f"data.{field}={value} is out of range; set it to {low} .. {high}")


def _example_shape(config: ConfigDict) -> tuple[int, ...]:
    size = config.image_size
    return (size, size, 3) if config.name == "imagenet" else IMAGES[config.name][1]


def _dataset(config: ConfigDict, train: Split, held: Split) -> Dataset:
    shape, name = _example_shape(config), config.name
    half = (0.5,) * shape[-1]
    own_mean, own_std = (MEAN, STD) if name == "imagenet" else (half, half)
    mean, std = tuple(config.mean or own_mean), tuple(config.std or own_std)
    return Dataset(name, train, held, shape, IMAGES[name][2], mean, std)


@dataclasses.dataclass(frozen=True)
class _Zeros:
    size: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": np.zeros(self.shape, np.uint8), "label": 0} for _ in keys]
