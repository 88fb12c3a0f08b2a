"""Reads splits of prepared TFDS data sets without TensorFlow, and caches decoded images."""

import contextlib
import hashlib
import logging
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from rezero_jax.data.stream import StreamSplit
from rezero_jax.devices import cache_folder
from rezero_jax.errors import UserError

_CHUNK = 500  # examples that a thread decodes at a time


class TfdsSource:
    """The examples of a split, as a stream.DataSource; reading damaged files raises UserError.

    Images are PNG or JPEG bytes, which Pillow decodes to the same pixels on every machine. `keys`
    are the names of the image and of the label in an example.
    """

    def __init__(
        self, builder: Any, split: str, keys: tuple[str, str] = ("image", "label")
    ) -> None:
        import tensorflow_datasets as tfds

        if split.partition("[")[0] not in builder.info.splits:
            raise UserError(
                f'data set "{builder.name}" in {builder.data_dir} has no {split} split; delete '
                "this folder to prepare the data set again"
            )
        self._paths = builder.info.splits[split].filepaths
        self._info, self._split, self._keys = builder.info, split, keys
        for path in self._paths:
            if not os.path.isfile(path):  # reading a pipe could block forever
                raise self._damaged(f"No such file: {path}")
        self._source = builder.as_data_source(split, decoders={keys[0]: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, keys: Sequence[int]) -> list[Mapping[str, Any]]:
        image, label = self._keys
        try:
            examples = self._source.__getitems__(list(keys))
        except RuntimeError as error:  # array_record verifies a hash of every chunk
            raise self._damaged(error) from error
        return [
            example | {"image": example[image], "label": example[label]} for example in examples
        ]

    def fingerprint(self) -> str:
        """A hash of the name of the split and all bytes of its files, in hexadecimal digits."""
        digest = hashlib.sha256(self._split.encode())
        try:
            for path in self._paths:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise self._damaged(error) from error
        return digest.hexdigest()[:16]

    def _damaged(self, error: object) -> UserError:
        info = self._info
        return UserError(
            f'data set "{info.name}" in {info.data_dir} is damaged ({error}); delete this folder '
            "to prepare the data set again"
        )


def supervised(builder: Any) -> tuple[tuple[str, str], int, tuple[str, ...]]:
    """The names of image and label in an example, the number of channels, and the classes.

    Raises a UserError unless the data set consists of images of 8 bits with one label each.
    """
    import tensorflow_datasets as tfds

    keys: Any = builder.info.supervised_keys or ()
    features = builder.info.features
    match [features[key] for key in keys if isinstance(key, str)]:
        case [tfds.features.Image() as image, tfds.features.ClassLabel() as label]:
            if image.np_dtype == np.uint8:
                return keys, image.shape[-1], tuple(label.names)
    raise UserError(
        f'data set "{builder.name}" is not one of images of 8 bits with one label each; choose '
        "another, or write its images into a folder for data.name=images"
    )


def cached_arrays(key: str, split: StreamSplit) -> dict[str, np.ndarray]:
    """All examples of `split`: {"image": uint8 (N, H, W, C), "label": int32 (N,)}.

    The arrays are read from <key>.npz in devices.cache_folder, if there is one, or, if this file is
    missing or damaged, decoded and written there. Raises a UserError if an image cannot be decoded,
    or the arrays exceed the memory of this machine.
    """
    path = (cache_folder() or Path(os.devnull)) / f"{key}.npz"  # which cannot be read or written
    warn = logging.getLogger(__name__).warning
    check_memory(split.name, split.size * math.prod(split.shape or ()))
    try:
        if path.is_file():  # reading a pipe could block forever
            stored = read_npz(path)
            if stored["image"].shape == (split.size, *(split.shape or ())):
                return {name: stored[name] for name in ("image", "label")}
            raise ValueError("images of other shapes")
    except OSError:
        pass
    except Exception as error:  # a damaged zip file raises many kinds of errors
        warn("%s is damaged (%s); decoding the images again", path, error)
    starts = range(0, split.size, _CHUNK)
    chunks = split.batches(
        lambda i: np.arange(starts[i], min(starts[i] + _CHUNK, split.size)), 0, len(starts)
    )
    label, unit = f"decoding {key}", " images"
    decoded = list(tqdm(chunks, label, len(starts), unit_scale=_CHUNK, unit=unit, delay=1))
    arrays = {name: np.concatenate([chunk[name] for chunk in decoded]) for name in decoded[0]}
    try:
        with whole_file(path) as file:
            np.savez(file, image=arrays["image"], label=arrays["label"])
    except OSError as error:
        warn("cannot cache the decoded %s: %s", key, error)
    return arrays


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; raises a UserError if they exceed the memory of this machine.

    A damaged file raises many kinds of errors.
    """
    with zipfile.ZipFile(path) as archive:
        check_memory(str(path), sum(member.file_size for member in archive.infolist()))
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}  # zip verifies the CRC-32


def check_memory(name: str, size: int) -> None:
    """Raises a UserError if `size` bytes are more than the memory of this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(
            f"{name} needs {size / 1e9:,.1f} GB of the {memory / 1e9:,.1f} GB of memory; put the "
            "images into files and set data.stream=True"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing; the file appears at `path` only if no error occurs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime > 3600:  # of a process that was killed
                left.unlink()
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
