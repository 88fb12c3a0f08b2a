"""Reads splits of prepared TFDS data sets without TensorFlow, and caches decoded images."""

import contextlib
import hashlib
import logging
import os
import tempfile
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

    Images are PNG or JPEG bytes, which Pillow decodes to the same pixels on every machine.
    """

    def __init__(self, builder: Any, split: str) -> None:
        import tensorflow_datasets as tfds

        if split not in builder.info.splits:
            raise UserError(
                f'data set "{builder.name}" in {builder.data_dir} has no {split} split; delete '
                "this folder to prepare the data set again"
            )
        self._paths = builder.info.splits[split].filepaths
        self._source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, keys: Sequence[int]) -> list[Mapping[str, Any]]:
        try:
            return self._source.__getitems__(list(keys))
        except RuntimeError as error:  # array_record verifies a hash of every chunk
            raise self._damaged(error) from error

    def fingerprint(self) -> str:
        """A hash of all bytes of the files, in hexadecimal digits."""
        digest = hashlib.sha256()
        try:
            for path in self._paths:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise self._damaged(error) from error
        return digest.hexdigest()[:16]

    def _damaged(self, error: Exception) -> UserError:
        info = self._source.dataset_info
        return UserError(
            f'data set "{info.name}" in {info.data_dir} is damaged ({error}); delete this folder '
            "to prepare the data set again"
        )


def cached_arrays(key: str, split: StreamSplit) -> dict[str, np.ndarray]:
    """All examples of `split`: {"image": uint8 (N, H, W, C), "label": int32 (N,)}.

    The arrays are read from <key>.npz in devices.cache_folder, or, if this file is missing or
    damaged, decoded and written there.
    """
    path = cache_folder() / f"{key}.npz"
    warn = logging.getLogger(__name__).warning
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            return {name: stored[name] for name in ("image", "label")}  # zip verifies the CRC-32
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


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing; the file appears at `path` only if no error occurs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
