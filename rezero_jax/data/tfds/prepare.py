"""Prepare a TFDS data set as array_record files, without TensorFlow.

The builder class does the work: it downloads, verifies checksums, splits and shuffles as TFDS
defines. Two things on its way ask for TensorFlow, and only those are replaced: plain file access
(`tf.io.gfile`) and encoding images. Pixels are encoded as PNG here; images that come as files
(ImageNet's JPEGs) are kept byte for byte.
"""

import contextlib
import fcntl
import io
import logging
import os
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rezero_jax.errors import UserError


def prepared_builder(name: str, data_dir: str | None = None) -> Any:
    """The TFDS builder of `name`, its data ready to be read with `as_data_source`.

    Data that is not in the folder yet is downloaded and prepared there, or prepared from archives
    in its downloads/manual where TFDS cannot download them (imagenet2012). TFDS writes to a folder
    of another name and renames it at the end, so an interrupted preparation leaves nothing behind
    that could be taken for the data set; other processes that want it wait until it is there. A
    split of more than 1 GB goes through temporary files of its size in that folder; memory stays
    below about 1 GB plus 1/256 of the split.

    Args:
      name: a TFDS name; of its features only "image" is ever encoded here.
      data_dir: where TFDS data lives; None is TFDS's own default ($TFDS_DATA_DIR or
          ~/tensorflow_datasets).

    Raises:
      UserError: the data set could not be downloaded, an archive that only the user can get is
          missing, or the data is damaged or in another format.
    """
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            _check_archives(builder)
        with _alone(builder):
            builder = _builder(name, data_dir)  # another process may have prepared it meanwhile
            if not builder.is_prepared():
                _prepare(builder)
    _check_files(builder)
    return builder


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        return tfds.builder(name, data_dir=data_dir)
    except ParseError as error:
        folder = f"{data_dir or tfds.core.constants.DATA_DIR}/{name}"
        raise UserError(
            f'data set "{name}": dataset_info.json in {folder} cannot be read; delete that folder '
            "to have the data set prepared again"
        ) from error


@contextlib.contextmanager
def _alone(builder: Any) -> Iterator[None]:
    """Waits until no other process prepares the data set, and keeps others waiting."""
    root = Path(builder.data_dir_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{builder.name}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning(
                'another process prepares data set "%s"; waiting for it', builder.name
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise _unavailable(builder, " ".join(str(error).split())) from error
    with lock:  # closing it frees it
        yield


def _prepare(builder: Any) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import shuffle
    from tensorflow_datasets.core.download import download_manager, downloader, extractor
    from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

    generate = builder._generate_examples

    def generate_encoded(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        for key, example in generate(*args, **kwargs):
            image = example.get("image")
            if isinstance(image, np.ndarray):
                example = {**example, "image": encode_png(image)}
            yield key, example

    builder._generate_examples = generate_encoded
    # The few files of ImageNet that are no RGB JPEGs are converted when they are read instead.
    builder._fix_image = lambda name, image: image
    file_access = _file_access()
    try:
        with contextlib.ExitStack() as replaced:
            own = sys.modules[type(builder).__module__]
            for module in (own, imagenet_common, extractor, shuffle):
                if hasattr(module, "tf"):
                    replaced.enter_context(_replaced(module, "tf", file_access))
            # A thousand files at once are more than many systems allow. The order is the same.
            replaced.enter_context(_replaced(shuffle, "BUCKETS_NUMBER", 256))
            # Ten retries, each after twice the wait, are three silent minutes without a network.
            replaced.enter_context(_replaced(downloader, "MAX_RETRIES", 4))
            builder.download_and_prepare(
                file_format="array_record",
                # The bucket of ready-made data holds tfrecord files only.
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except tarfile.TarError as error:
        raise UserError(
            f'an archive of data set "{builder.name}" in {builder.data_dir_root}/downloads is '
            f"damaged ({' '.join(str(error).split())}); download it again"
        ) from error
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


def damaged(info: Any, error: RuntimeError) -> UserError:
    """The error for records of a prepared data set (a DatasetInfo) that cannot be read."""
    return UserError(
        f'data set "{info.name}" in {info.data_dir} is damaged ({error}); delete that folder to '
        "have the data set prepared again"
    )


def _check_archives(builder: Any) -> None:
    """Raise UserError unless the user has put every archive where the builder looks for it."""
    folder = Path(builder.data_dir_root) / "downloads" / "manual"
    sizes = {url.rpartition("/")[2]: int(info.size) for url, info in builder.url_infos.items()}
    missing = [name for name in sizes if not (folder / name).exists()]
    if missing:
        raise UserError(
            f'data set "{builder.name}" is not prepared in {builder.data_dir_root} and cannot be '
            f"downloaded without an account; register at {builder.info.homepage} and put "
            f"{' and '.join(missing)} into {folder}, or set TFDS_DATA_DIR or --config.data.dir to "
            "a folder that holds the prepared data set"
        )
    for name, size in sizes.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise UserError(
                f"{folder / name} has {found} bytes and should have {size}; download it again"
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
    _allow_open_files(sum(len(split.filepaths) for split in builder.info.splits.values()))


def _allow_open_files(count: int) -> None:
    """Let this process hold `count` files open besides its own, as readers of array_record do.

    ImageNet has 1,088 files; most systems allow a process 1,024 unless it asks for more.

    Raises:
      UserError: it may not ask for so many.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"the data set needs {wanted} open files and the system allows {hard}; raise the hard "
            f"limit (ulimit -Hn) to at least {wanted}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _file_access() -> types.SimpleNamespace:
    """The few plain things that TFDS takes from TensorFlow on the way, laid out as in `tf`."""
    from etils import epath

    gfile = types.SimpleNamespace(
        GFile=lambda path, mode="r": epath.Path(path).open(mode),
        exists=os.path.exists,
        remove=os.remove,
    )
    return types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=gfile),
        compat=types.SimpleNamespace(as_text=os.fsdecode),
        errors=types.SimpleNamespace(ResourceExhaustedError=()),  # `except ()` catches nothing
    )


@contextlib.contextmanager
def _replaced(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    """module.name is `value` inside the with statement."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
