"""Data sets by name, and the order in which a run visits their examples."""

import dataclasses

from rezero_jax.data.images import TFDS_NAMES, digits, tfds_images
from rezero_jax.data.order import Order, eval_batches
from rezero_jax.data.split import Dataset, ResidentSplit, Split, standardise
from rezero_jax.data.stream import StreamSplit
from rezero_jax.data.text import TEXT_NAMES, Text, TextSplit, load_text
from rezero_jax.data.tfds.imagenet import imagenet2012
from rezero_jax.errors import UserError, choose_from

__all__ = [
    "NAMES",
    "Dataset",
    "Order",
    "ResidentSplit",
    "Split",
    "StreamSplit",
    "Text",
    "TextSplit",
    "eval_batches",
    "load",
    "standardise",
]

NAMES = ("digits", "imagenet", *TFDS_NAMES, *TEXT_NAMES)


def load(
    name: str,
    data_dir: str | None = None,
    stream: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    *,
    image_size: int = 224,
    path: str | None = None,
    length: int = 256,
    windows: str = "segments",
    context: int = 0,
    eval_split: str = "validation",
    seed: int = 0,
) -> Dataset | Text:
    """The data set `name`, one of NAMES.

    Args:
      name: "digits" and "stdlib" need no files and "text" has the user's; the others are TFDS data
          sets. "enwik8", "stdlib" and "text" are text, the others images.
      data_dir: where TFDS data lives; None is TFDS's default ($TFDS_DATA_DIR or
          ~/tensorflow_datasets). A data set that is not there is downloaded and prepared there.
      stream: images only: decode them batch by batch instead of keeping all of them on the
          device. The batches are the same; "digits" is always resident, "imagenet" always
          streamed.
      mean, std: images only: per channel, for pixels scaled to 0 .. 1, in place of the data set's
          own: 0.5, or for "imagenet" its statistics.
      image_size: "imagenet" only: height and width of the images.
      path: "text" only: the file or folder that holds it.
      length, windows, context, eval_split: text only: what an example is and which part
          evaluates; see text.load_text.
      seed: "imagenet" and text only: what random crops and random windows are drawn from, with
          the number of the update.

    Raises:
      UserError: the name is unknown, mean or std does not fit the channels, image_size is not
          positive, the arguments of a text do not fit it or each other, or the data set is neither
          there nor to be downloaded.
    """
    if name not in NAMES:
        raise choose_from("data set", name, NAMES)
    if name in TEXT_NAMES:
        return load_text(
            name,
            data_dir,
            path,
            length=length,
            windows=windows,
            context=context,
            eval_split=eval_split,
            seed=seed,
        )
    if name == "digits":
        dataset = digits()
    elif name == "imagenet":
        dataset = imagenet2012(data_dir, image_size, seed)
    else:
        dataset = tfds_images(name, data_dir, stream)
    channels = dataset.example_shape[-1]
    for what, values in (("mean", mean), ("std", std)):
        if values and len(values) != channels:
            raise UserError(f'{what} of "{name}" has {len(values)} values; give it {channels}')
    return dataclasses.replace(
        dataset, mean=tuple(mean or dataset.mean), std=tuple(std or dataset.std)
    )
