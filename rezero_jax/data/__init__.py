"""Data sets by name, and the order in which a run visits their examples."""

import dataclasses

from rezero_jax.data.images import TFDS_NAMES, digits, tfds_images
from rezero_jax.data.order import Order, eval_batches
from rezero_jax.data.source import Dataset, ResidentSplit, Split, standardise
from rezero_jax.data.stream import StreamSplit
from rezero_jax.errors import UserError, choose_from

__all__ = [
    "NAMES",
    "Dataset",
    "Order",
    "ResidentSplit",
    "Split",
    "StreamSplit",
    "eval_batches",
    "load",
    "standardise",
]

NAMES = ("digits", *TFDS_NAMES)


def load(
    name: str,
    data_dir: str | None = None,
    stream: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """The data set `name`, one of NAMES.

    Args:
      name: "digits" needs no files; the others are TFDS data sets.
      data_dir: where TFDS data lives; None is TFDS's default ($TFDS_DATA_DIR or
          ~/tensorflow_datasets). A data set that is not there is downloaded and prepared there.
      stream: decode images batch by batch instead of keeping all of them on the device. The
          batches are the same; "digits" is always resident.
      mean, std: per channel, for pixels scaled to 0 .. 1, in place of the default 0.5.

    Raises:
      UserError: the name is unknown, mean or std does not fit the channels, or the data set is
          neither there nor to be downloaded.
    """
    if name not in NAMES:
        raise choose_from("data set", name, NAMES)
    dataset = digits() if name == "digits" else tfds_images(name, data_dir, stream)
    channels = dataset.example_shape[-1]
    for what, values in (("mean", mean), ("std", std)):
        if values and len(values) != channels:
            raise UserError(f'{what} of "{name}" has {len(values)} values; give it {channels}')
    return dataclasses.replace(
        dataset, mean=tuple(mean or dataset.mean), std=tuple(std or dataset.std)
    )
