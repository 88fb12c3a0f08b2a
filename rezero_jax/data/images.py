"""Image classification data sets: scikit-learn's digits and those of TensorFlow Datasets (TFDS)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rezero_jax.data.split import Dataset, ResidentSplit, Split
from rezero_jax.data.stream import StreamSplit
from rezero_jax.data.tfds.cache import cached_arrays, fingerprint
from rezero_jax.data.tfds.prepare import damaged, prepared_builder

TFDS_NAMES = ("cifar10", "cifar100", "fashion_mnist", "mnist", "svhn_cropped")


def digits() -> Dataset:
    """The 1,797 handwritten digits 8x8x1 that come with scikit-learn: 1,437 train, 360 eval.

    Every fifth image of each class is in eval, so both parts have the same mix of classes. Pixels
    0 .. 16 are scaled to uint8 0 .. 255.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    image = np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None]
    label = loaded.target.astype(np.int32)
    held_out = np.zeros(len(label), bool)
    held_out[np.argsort(label, kind="stable")[::5]] = True
    train, held = (
        ResidentSplit({"image": image[part], "label": label[part]})
        for part in (~held_out, held_out)
    )
    return Dataset("digits", train, held, (8, 8, 1), 10, mean=(0.5,), std=(0.5,))


def tfds_images(name: str, data_dir: str | None = None, stream: bool = False) -> Dataset:
    """One of TFDS_NAMES: its "train" split, and "test" as eval; mean and std are 0.5.

    Read without TensorFlow, and downloaded and prepared first if need be. By default the images
    are decoded once, kept in a cache on disk, and live on the device; with `stream` they are
    decoded anew for each batch and the device holds no data. The batches are the same.

    Raises:
      UserError: the data set is not there and cannot be downloaded, or its files are damaged.
    """
    builder = prepared_builder(name, data_dir)
    shape = tuple(builder.info.features["image"].shape)
    half = (0.5,) * shape[-1]
    num_classes = builder.info.features["label"].num_classes

    def split(part: str) -> Split:
        records = EncodedImages(builder, part)
        streamed = StreamSplit(records, pixels=decode, name=name, num_classes=num_classes)
        if stream:
            return streamed
        key = f"{name}/{builder.info.version}-{fingerprint(builder.data_path)}/{part}"
        return ResidentSplit(cached_arrays(key, streamed))

    return Dataset(name, split("train"), split("test"), shape, num_classes, half, half)


class EncodedImages:
    """A split of a TFDS builder, its images still PNG or JPEG bytes; see stream.Records.

    We decode them with Pillow, whatever else is installed, so that pixels never depend on the
    machine.
    """

    def __init__(self, builder: Any, part: str) -> None:
        import tensorflow_datasets as tfds

        keep_bytes = {"image": tfds.decode.SkipDecoding()}
        self._source = builder.as_data_source(part, decoders=keep_bytes)

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, keys: Sequence[int]) -> list[Mapping[str, Any]]:
        try:
            return self._source.__getitems__(list(keys))
        except RuntimeError as error:  # array_record checks a hash of every chunk
            raise damaged(self._source.dataset_info, error) from error


def decode(encoded: bytes, step: int = 0, position: int = 0) -> np.ndarray:
    """All pixels of an encoded image, uint8 (H, W, C), at every step; see stream.StreamSplit."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
