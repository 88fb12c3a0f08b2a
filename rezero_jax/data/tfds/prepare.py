"""Prepares a TFDS data set as array_record files, without TensorFlow.

TFDS's own builder downloads, verifies checksums, splits and shuffles. This module replaces the two
steps that need TensorFlow: file access (`tf.io.gfile`) and image encoding. Pixels are encoded as
PNG; images that are files (ImageNet's JPEGs) are unchanged.
"""

import contextlib
import fcntl
import io
import logging
import os
import re
import resource
import shutil
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from rezero_jax.errors import UserError, hint_beside


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides TFDS's warnings and retries from the log; a persistent failure raises."""

    def is_error(record: logging.LogRecord) -> bool:  # a new object per thread
        return record.levelno >= logging.ERROR

    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, ("absl", "urllib3.connectionpool")):
            logger.addFilter(is_error)
            stack.callback(logger.removeFilter, is_error)
        yield


@_quiet()
def prepared_builder(name: str, data_dir: str | None = None, download: bool = True) -> Any:
    """The TFDS builder of `name`, with its data ready for `as_data_source`.

    Missing data is downloaded and prepared in `data_folder`, or prepared from archives in
    downloads/manual if TFDS cannot download them (imagenet2012); other processes wait. Memory stays
    below about 1 GB plus 1/256 of a split. Without `download`, missing data is an error. Raises a
    UserError if the folder or an archive is missing, the download fails, the data is damaged or in
    another format, or the system allows too few open files.
    """
    data_folder(data_dir)
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        if not download:
            raise _unavailable(builder, "this command downloads nothing")
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            _check_archives(builder)
        with _alone(builder):
            builder = _builder(name, data_dir)  # another process may have prepared it meanwhile
            if not builder.is_prepared():
                _prepare(builder)
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f'data set "{builder.name}" in {builder.data_dir} is in {file_format} format, which '
            "needs TensorFlow; set TFDS_DATA_DIR or --config.data.dir to another folder, to "
            "prepare the data set there as array_record"
        )
    allow_open_files(sum(len(split.filepaths) for split in builder.info.splits.values()))
    return builder


def data_folder(data_dir: str | None) -> Path:
    """The folder of downloaded data: `data_dir`, $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises a UserError if the given folder is missing.
    """
    given = data_dir or os.environ.get("TFDS_DATA_DIR")
    folder = Path(given or "~/tensorflow_datasets").expanduser()
    if given and not folder.is_dir():
        hint = hint_beside(folder, "create it, or name another one")
        field = "data.dir" if data_dir else "TFDS_DATA_DIR"
        raise UserError(f"there is no folder {folder} ({field}={given}); {hint}")
    return folder


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    # Other forms of a name, such as "namespace:name", would download and run code.
    if not re.fullmatch(r"[a-z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", name):
        raise UserError(f'"tfds:{name}" names no data set; give tfds:NAME, such as tfds:cifar10')
    for path in (data_folder(data_dir) / name.partition(":")[0]).rglob("*.json"):
        if not path.is_file():  # reading a pipe could block forever
            raise UserError(f"{path} is not a file; delete it to prepare the data set again")
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # such as an unknown name, or a builder that needs TensorFlow
        reason = " ".join(str(error).rpartition('}": ')[2].split())  # without arguments
        raise UserError(
            f'TensorFlow Datasets has no data set "{name}" that can be used ({reason[:200]}); '
            f"choose another one, or delete {data_folder(data_dir) / name} to prepare it again"
        ) from error


@contextlib.contextmanager
def _alone(builder: Any) -> Iterator[None]:
    """Locks the data folder while one process prepares data; a failure removes temporary files."""
    root = Path(builder.data_dir_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".preparing.lock").open("w")
    except OSError as error:
        raise _unavailable(builder, error) from error
    with lock:  # closing the file releases the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log = logging.getLogger(__name__)
            log.warning("waiting for another process that prepares data in %s", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except BaseException:
            downloads = root / "downloads"
            for left in (*downloads.rglob("*.tmp.*"), *downloads.rglob("incomplete*")):
                shutil.rmtree(left, ignore_errors=True)
            raise


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
    # Crop converts the few files of ImageNet that are not RGB JPEGs when it reads them.
    builder._fix_image = lambda name, image: image
    try:
        with contextlib.ExitStack() as replaced:
            own = sys.modules[type(builder).__module__]
            for module in (own, imagenet_common, extractor, shuffle):
                if hasattr(module, "tf"):
                    replaced.enter_context(patch.object(module, "tf", _file_access()))
            # Many systems allow fewer than a thousand open files; the order is the same.
            replaced.enter_context(patch.object(shuffle, "BUCKETS_NUMBER", 256))
            # Ten retries with exponential backoff would take three silent minutes when offline.
            replaced.enter_context(patch.object(downloader, "MAX_RETRIES", 4))
            builder.download_and_prepare(
                file_format="array_record",
                # TFDS's bucket of prepared data has tfrecord files only.
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except tarfile.TarError as error:
        raise UserError(
            f'an archive of data set "{builder.name}" in {builder.data_dir_root}/downloads is '
            f"damaged ({' '.join(str(error).split())}); download it again"
        ) from error
    except download_manager.NonMatchingChecksumError as error:
        raise _unavailable(builder, "the download has the wrong checksum") from error
    # OSError covers the network, the disk and permissions.
    except (OSError, tfds.download.DownloadError, extractor.ExtractError) as error:
        raise _unavailable(builder, error) from error
    except (AttributeError, ImportError) as error:
        raise _unavailable(builder, f"without TensorFlow: {error}") from error


def _unavailable(builder: Any, reason: object) -> UserError:
    return UserError(
        f'data set "{builder.name}" is not prepared in {builder.data_dir_root} and could not be '
        f"downloaded or prepared ({' '.join(str(reason).split())}); set TFDS_DATA_DIR or "
        "--config.data.dir to a folder that contains it"
    )


def _check_archives(builder: Any) -> None:
    """Raises UserError unless every archive is in downloads/manual."""
    folder = Path(builder.data_dir_root) / "downloads" / "manual"
    wrong = []
    for url, info in builder.url_infos.items():
        path = folder / url.rpartition("/")[2]
        if not path.exists() or path.stat().st_size != info.size:
            wrong.append(f"{path.name} ({int(info.size)} bytes)")
    if wrong:
        missing = f"put {' and '.join(wrong)} into {folder}"
        raise _unavailable(
            builder, f"this needs an account: register at {builder.info.homepage} and {missing}"
        )


def allow_open_files(count: int) -> None:
    """Raises the process's limit of open files so that array_record can open `count` files at once.

    ImageNet has 1,088 files, and most systems allow 1,024 by default.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except ValueError as error:
        raise UserError(
            f"the data set needs {wanted} open files and the system allows {hard}; raise the hard "
            f"limit (ulimit -Hn) to at least {wanted}"
        ) from error


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 pixels (H, W, 3) or (H, W, 1) as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _file_access() -> types.SimpleNamespace:
    """Replacements for the functions of `tf` that TFDS calls to prepare a data set."""
    space = types.SimpleNamespace
    return space(
        io=space(gfile=space(GFile=open, exists=os.path.exists, remove=os.remove)),
        compat=space(as_text=os.fsdecode),
        errors=space(ResourceExhaustedError=()),  # `except ()` catches nothing
    )
