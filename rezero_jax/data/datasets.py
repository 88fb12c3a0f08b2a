"""Data sets by name, and stand-ins of their sizes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rezero_jax.data.images import IMAGES, digits, tfds_images
from rezero_jax.data.split import Dataset, ResidentSplit, Split
from rezero_jax.data.stream import StreamSplit
from rezero_jax.data.text import TEXT_NAMES, Text, load_text
from rezero_jax.data.tfds.imagenet import imagenet2012
from rezero_jax.errors import UserError, choose_from

NAMES = ("digits", *IMAGES, *TEXT_NAMES)


def load(config: ConfigDict, seed: int = 0) -> Dataset | Text:
    """The data set that a config names.

    "digits" and "stdlib" come with Python packages and "text" is the user's own; the others are
    TFDS data sets, downloaded and prepared on first use. "enwik8", "stdlib" and "text" are text,
    the others images. config.stream decodes images batch by batch instead of keeping them on the
    device; the batches are the same. "digits" is always resident and "imagenet" streamed.

    Args:
      config: config.data, see config.base_config; the augmentation is not read.
      seed: with the number of the update, decides random crops ("imagenet") and windows (text).

    Raises:
      UserError: a field is invalid or does not fit the data set, or the data set cannot be read or
          downloaded.
    """
    _check(config)
    if config.name in TEXT_NAMES:
        return load_text(config, seed)
    if config.name == "digits":
        dataset = digits()
    elif config.name == "imagenet":
        dataset = imagenet2012(config, seed)
    else:
        dataset = tfds_images(config)
    return _with_statistics(dataset, config)


def stand_in(config: ConfigDict) -> Dataset | Text | None:
    """Zeros in the sizes of the data set that config.data names, for plans.

    Nothing is read, downloaded or written, and hardly any memory is taken. Returns None for
    "digits", "stdlib" and "text", which need no download.

    Raises:
      UserError: a field is invalid or does not fit the data set.
    """
    _check(config)
    if config.name == "enwik8":
        from rezero_jax.data.tfds.enwik8 import Enwik8  # importing TFDS takes a while

        zeros = {name: np.broadcast_to(np.uint8(0), size) for name, size in Enwik8.SIZES.items()}
        return load_text(config, read=lambda config: (zeros["train"], zeros[config.eval_split]))
    if config.name not in IMAGES:
        return None
    sizes, shape, num_classes = IMAGES[config.name]
    if config.name == "imagenet":
        shape = (config.image_size, config.image_size, 3)

    def split(size: int) -> Split:
        if config.stream or config.name == "imagenet":
            return StreamSplit(_Zeros(size, shape))
        image, label = np.broadcast_to(np.uint8(0), (size, *shape)), np.zeros(size, np.int32)
        return ResidentSplit({"image": image, "label": label})

    half = (0.5,) * shape[-1]
    train, held = map(split, sizes)
    dataset = Dataset(config.name, train, held, shape, num_classes, half, half)
    return _with_statistics(dataset, config)


def _check(config: ConfigDict) -> None:
    """Raises UserError for what is wrong whatever the data set holds."""
    if config.name not in NAMES:
        raise choose_from("data set", config.name, NAMES)
    if config.name == "imagenet" and config.image_size < 1:
        raise UserError(f"data.image_size={config.image_size} is not positive; set it to 224, say")


def _with_statistics(dataset: Dataset, config: ConfigDict) -> Dataset:
    """The data set with config.mean and config.std in place of its own, where they are set."""
    channels = dataset.example_shape[-1]
    for what, values in (("mean", config.mean), ("std", config.std)):
        if values and len(values) != channels:
            raise UserError(
                f'{what} of "{config.name}" has {len(values)} values; give it {channels}'
            )
    return dataclasses.replace(
        dataset, mean=tuple(config.mean or dataset.mean), std=tuple(config.std or dataset.std)
    )


@dataclasses.dataclass(frozen=True)
class _Zeros:
    """A stream.DataSource of black images of this shape."""

    size: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": np.zeros(self.shape, np.uint8), "label": 0} for _ in keys]
