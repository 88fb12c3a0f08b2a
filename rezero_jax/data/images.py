"""Image classification data sets: scikit-learn's digits and those of TensorFlow Datasets (TFDS)."""

import io

import numpy as np
from ml_collections import ConfigDict

from rezero_jax.data.split import Dataset, ResidentSplit, Split
from rezero_jax.data.stream import StreamSplit
from rezero_jax.data.tfds.cache import cached_arrays, fingerprint
from rezero_jax.data.tfds.prepare import prepared_builder
from rezero_jax.data.tfds.source import TfdsSource

# Of TFDS: examples to train on and to evaluate on, shape of an image, classes.
IMAGES = {
    "cifar10": ((50_000, 10_000), (32, 32, 3), 10),
    "cifar100": ((50_000, 10_000), (32, 32, 3), 100),
    "fashion_mnist": ((60_000, 10_000), (28, 28, 1), 10),
    "mnist": ((60_000, 10_000), (28, 28, 1), 10),
    "svhn_cropped": ((73_257, 26_032), (32, 32, 3), 10),
    "imagenet": ((1_281_167, 50_000), (224, 224, 3), 1000),  # in the usual size
}


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8x1: 1,437 train, every fifth of a class eval.

    Pixels 0 .. 16 are scaled to uint8 0 .. 255.
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


def tfds_images(config: ConfigDict) -> Dataset:
    """The one of IMAGES (but imagenet) that config.data names: "train", and "test" as eval.

    The images are decoded once, cached on disk and kept on the device; with config.stream they are
    decoded anew for each batch. The mean and std are 0.5. Raises UserError as `datasets.load` does.
    """
    name = config.name
    builder = prepared_builder(name, config.dir)
    _, shape, num_classes = IMAGES[name]

    def split(part: str, workers: int = 0) -> Split:
        streamed = StreamSplit(
            TfdsSource(builder, part),
            pixels=decode,
            name=name,
            num_classes=num_classes,
            workers=workers,
        )
        if config.stream:
            return streamed
        key = f"{name}/{builder.info.version}-{fingerprint(builder.data_path)}/{part}"
        return ResidentSplit(cached_arrays(key, streamed))

    half = (0.5,) * shape[-1]
    train = split("train", config.workers)
    return Dataset(name, train, split("test"), shape, num_classes, half, half)


def decode(encoded: bytes, step: int = 0, position: int = 0) -> np.ndarray:
    """The pixels of an encoded image, uint8 (H, W, C); see stream.StreamSplit."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
