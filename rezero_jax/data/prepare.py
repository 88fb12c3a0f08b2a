"""Prepare an official TFDS image data set as array_record files, without TensorFlow.

The official builder class does the work: it downloads, verifies checksums, splits and shuffles as
TFDS defines. Two things on its way ask for TensorFlow, and only those are replaced: plain file
access (`tf.io.gfile`) and encoding pixels as PNG.
"""

import contextlib
import io
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from rezero_jax.errors import UserError


def prepared_builder(name: str, data_dir: str | None = None) -> Any:
    """The TFDS builder of `name`, its data ready to be read with `as_data_source`.

    Data that is not in the folder yet is downloaded and prepared there. TFDS writes to a folder of
    another name and renames it at the end, so an interrupted preparation leaves nothing behind
    that could be taken for the data set.

    Args:
      name: a TFDS name whose features are "image" and "label" and perhaps more.
      data_dir: where TFDS data lives; None is TFDS's own default ($TFDS_DATA_DIR or
          ~/tensorflow_datasets).

    Raises:
      UserError: the data set could not be downloaded, is damaged, or is in another format.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except ParseError as error:
        folder = f"{data_dir or tfds.core.constants.DATA_DIR}/{name}"
        raise UserError(
            f'data set "{name}": dataset_info.json in {folder} cannot be read; delete that folder '
            "to have the data set prepared again"
        ) from error
    if not builder.is_prepared():
        _prepare(builder)
    _check_files(builder)
    return builder


def _prepare(builder: Any) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import shuffle
    from tensorflow_datasets.core.download import download_manager, downloader, extractor

    generate = builder._generate_examples

    def generate_png(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        for key, example in generate(*args, **kwargs):
            yield key, {**example, "image": encode_png(example["image"])}

    builder._generate_examples = generate_png
    file_access = _file_access()
    try:
        with contextlib.ExitStack() as replaced:
            for module in (sys.modules[type(builder).__module__], extractor):
                replaced.enter_context(_replaced(module, "tf", file_access))
            # Larger splits would be shuffled through a thousand files opened with TensorFlow.
            replaced.enter_context(_replaced(shuffle, "MAX_MEM_BUFFER_SIZE", 8 << 30))
            # Ten retries, each after twice the wait, are three silent minutes without a network.
            replaced.enter_context(_replaced(downloader, "MAX_RETRIES", 4))
            builder.download_and_prepare(
                file_format="array_record",
                # The bucket of ready-made data holds tfrecord files only.
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except download_manager.NonMatchingChecksumError as error:
        raise _unavailable(builder, "what was downloaded has the wrong checksum") from error
    # OSError covers the network, the disk and permissions.
    except (OSError, tfds.download.DownloadError, extractor.ExtractError) as error:
        raise _unavailable(builder, " ".join(str(error).split())) from error


def _unavailable(builder: Any, reason: str) -> UserError:
    return UserError(
        f'data set "{builder.name}" is not prepared in {builder.data_dir_root} and could not be '
        f"downloaded ({reason}); set TFDS_DATA_DIR or --config.data.dir to a folder that holds it"
    )


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8 pixels (H, W, 3) or (H, W, 1); lossless."""
    from PIL import Image

    pixels = image[..., 0] if image.shape[-1] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _check_files(builder: Any) -> None:
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f'data set "{builder.name}" in {builder.data_dir} is in {file_format} form, which only '
            "TensorFlow reads; set TFDS_DATA_DIR or --config.data.dir to another folder, where it "
            "can be prepared as array_record"
        )
    for split in builder.info.splits.values():
        for path in split.filepaths:
            if not path.exists():
                raise UserError(
                    f'data set "{builder.name}" is incomplete: {path} is missing; copy that file '
                    "there, or delete its folder to have the data set prepared again"
                )


def _file_access() -> types.SimpleNamespace:
    """The two plain functions that TFDS takes from TensorFlow on the way, laid out as in `tf`."""
    from etils import epath

    gfile = types.SimpleNamespace(GFile=lambda path, mode="r": epath.Path(path).open(mode))
    compat = types.SimpleNamespace(as_text=os.fsdecode)
    return types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile), compat=compat)


@contextlib.contextmanager
def _replaced(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    """module.name is `value` inside the with statement."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
