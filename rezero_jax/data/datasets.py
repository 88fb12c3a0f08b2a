"""Loads data sets by name, and makes stand-ins of their sizes."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rezero_jax.data.images import ImageFiles, evaluation_part, image_arrays, image_files
from rezero_jax.data.pixels import MEAN, STD, Crop, Decode
from rezero_jax.data.split import Dataset, ResidentSplit, Split
from rezero_jax.data.stream import StreamSplit
from rezero_jax.data.text import EVAL_SPLITS, TEXT_NAMES, Text, load_text
from rezero_jax.data.text_files import ENWIK8_BYTES
from rezero_jax.data.tfds.prepare import prepared_builder
from rezero_jax.data.tfds.source import TfdsSource, cached_arrays, supervised
from rezero_jax.errors import UserError, check_between, check_choice, choose_from, hint_beside

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
NAMES = (*IMAGES, "images", *TEXT_NAMES)
OF_USERS = ("images", "text")  # read from data.path


def load(config: ConfigDict, seed: int = 0, download: bool = True) -> Dataset | Text:
    """Loads the data set that config.data names.

    "digits" and "stdlib" come with Python packages; "images" and "text" are the user's. With
    `download`, other data sets are downloaded and prepared on first use. `seed` determines, with
    the number of the update, random crops ("imagenet") and windows (text). Raises a UserError if a
    field is invalid, or the data set cannot be read or downloaded.
    """
    _check(config)
    if config.name in TEXT_NAMES:
        return load_text(config, seed, download=download)
    if config.name == "digits":
        return digits(config)
    if config.name == "images":
        return own_images(config)
    return tfds_images(config, seed, download)


def stand_in(config: ConfigDict) -> Dataset | Text | None:
    """Zeros in the sizes of the data set that config.data names, for plans.

    This needs neither a download nor memory. Returns None for data sets that need no download, and
    for those of other sizes than IMAGES has. Raises a UserError if a field is invalid.
    """
    _check(config)
    if config.name == "enwik8":
        return load_text(config, text=np.broadcast_to(np.uint8(0), ENWIK8_BYTES))
    if config.name == "digits" or config.name not in IMAGES:
        return None
    shape = _example_shape(config)

    def split(size: int) -> Split:
        if config.stream or config.name == "imagenet":
            return StreamSplit(_Zeros(size, shape))
        image, label = np.broadcast_to(np.uint8(0), (size, *shape)), np.zeros(size, np.int32)
        return ResidentSplit({"image": image, "label": label})

    sizes, _, count = IMAGES[config.name]
    return _dataset(config, map(split, sizes), shape, tuple(map(str, range(count))))


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
    return _dataset(config, splits, IMAGES["digits"][1], tuple("0123456789"))


def own_images(config: ConfigDict) -> Dataset:
    """The user's own images, in a folder or an .npz file at config.path; see data.images."""
    path = Path(config.path or "").expanduser()
    try:
        if config.path and path.is_dir():
            sources, classes = image_files(path, config)
            return _images(config, sources, classes, [Decode(config.image_size, upright=True)] * 2)
        if path.is_file() and path.suffix.lower() == ".npz":
            splits, classes = image_arrays(path, config)
            return _dataset(config, splits, splits[0].arrays["image"].shape[1:], classes)
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror}); repair or remove it"
        ) from error
    hint = hint_beside(path, "set --config.data.path to one")
    raise UserError(f"data.path={config.path} is not a folder or .npz file of images; {hint}")


def tfds_images(config: ConfigDict, seed: int, download: bool = True) -> Dataset:
    """Loads the image data set that config.data names from TFDS.

    "imagenet" is always streamed, as random crops for training and central crops for evaluation. Of
    "tfds:NAME", where NAME may have a configuration and a version (name/config:1.0.0), the splits
    are train and config.eval_split, or else the other one of validation and test, or else the last
    `config.eval_fraction` of train.
    """
    name, imagenet = config.name.removeprefix("tfds:"), config.name == "imagenet"
    builder = prepared_builder("imagenet2012" if imagenet else name, config.dir, download)
    keys, channels, classes = supervised(builder)
    parts = ("train", "validation" if imagenet else "test")
    if name != config.name:
        percent = round(100 * (1 - config.eval_fraction))
        held = evaluation_part(config, builder.info.splits)
        parts = ("train", held) if held else (f"train[:{percent}%]", f"train[{percent}%:]")
    sources = {part: TfdsSource(builder, part, keys) for part in parts}
    if not imagenet:
        return _images(config, sources, classes, [Decode(config.image_size, channels)] * 2)
    size = _example_shape(config)[0]
    return _images(config, sources, classes, [Crop(size, seed), Crop(size)], stream=True)


def _images(
    config: ConfigDict,
    sources: Mapping[str, ImageFiles | TfdsSource],
    classes: tuple[str, ...],
    pixels: Sequence[Callable[[Any, int, int], np.ndarray]],
    stream: bool = False,
) -> Dataset:
    """The data set of a training and an evaluation source, whose images `pixels` decode.

    Images are decoded once, cached on disk and kept on the device, or, with `stream` or
    config.stream, decoded for each batch; the batches are equal.
    """
    splits: list[Split] = []
    shape: tuple[int, ...] | None = None  # of the first image
    for (part, source), decode in zip(sources.items(), pixels, strict=True):
        name, workers = f"{config.name}/{part}", 0 if splits else config.workers
        if not len(source):
            raise UserError(f"{name} has no images; add images, or change data.eval_fraction")
        threads = min(16 if stream else 8, os.cpu_count() or 1)
        split = StreamSplit(source, threads, 16, decode, name, len(classes), shape, workers)
        if shape is None:
            shape = split.fetch(np.zeros(1, np.int32))["image"].shape[1:]
            split = dataclasses.replace(split, shape=shape)
        if stream or config.stream:
            splits.append(split)
        else:
            size = "" if config.image_size is None else f"-{config.image_size}"
            key = f"{re.sub('[^0-9A-Za-z_/]+', '-', name)}-{source.fingerprint()}{size}"
            splits.append(ResidentSplit(cached_arrays(key, split)))
    assert shape is not None
    return _dataset(config, splits, shape, classes)


def _check(config: ConfigDict) -> None:
    if config.name not in NAMES and not config.name.startswith("tfds:"):
        raise choose_from("data set", config.name, (*NAMES, "tfds:NAME"))
    check_between(0, config.workers, 1024, "data.workers")
    check_between(1, config.image_size, 10_000, "data.image_size")
    check_between(0.01, config.eval_fraction, 0.99, "data.eval_fraction")
    check_choice("data.eval_split", config.eval_split, EVAL_SPLITS)


def _example_shape(config: ConfigDict) -> tuple[int, ...]:
    """The shape of the images of a data set in IMAGES."""
    *sides, channels = IMAGES[config.name][1]
    return (*([config.image_size] * 2 if config.image_size else sides), channels)


def _dataset(
    config: ConfigDict, splits: Iterable[Split], shape: tuple[int, ...], classes: tuple[str, ...]
) -> Dataset:
    train, held = splits
    half = (0.5,) * shape[-1]
    own_mean, own_std = (MEAN, STD) if config.name == "imagenet" else (half, half)
    mean, std = tuple(config.mean or own_mean), tuple(config.std or own_std)
    return Dataset(config.name, train, held, shape, len(classes), mean, std, classes)


@dataclasses.dataclass(frozen=True)
class _Zeros:
    size: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": np.zeros(self.shape, np.uint8), "label": 0} for _ in keys]
