"""Text from files: the user's own, the sources of Python's standard library, and enwik8."""

import hashlib
import http.client
import logging
import os
import sysconfig
import urllib.request
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rezero_jax.data.tfds.prepare import data_folder
from rezero_jax.data.tfds.source import whole_file
from rezero_jax.errors import UserError, hint_beside, printable

LONGEST = 2**31 - 2  # bytes; positions, including the start byte, must fit in int32

# Third-party code, tests, and folders that some installations of the standard library lack.
LEFT_OUT = {"__pycache__", "dist-packages", "site-packages", "test", "tests"}
LEFT_OUT |= {"ensurepip", "idlelib", "lib2to3", "turtledemo"}

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_ARCHIVE_BYTES = 36_445_475
ENWIK8_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"  # of the archive
# Of the file in the archive, from http://mattmahoney.net/dc/textdata.html.
ENWIK8_BYTES = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"


def user_text(path: str | None) -> np.ndarray:
    """The bytes of a file, or of the files below a folder joined by newlines, uint8 (N,).

    Files are in the order of their paths; see `files_below`. Raises a UserError if the path is
    unset, no file or folder, unreadable, empty or longer than LONGEST.
    """
    if not path:
        raise UserError("data.name=text needs a file or folder; set --config.data.path=...")
    root = Path(path).expanduser()
    try:
        if not (root.is_file() or root.is_dir()):  # reading a pipe could block forever
            hint = hint_beside(root, "give another path")
            raise UserError(f"data.path={path} is not a file or folder; {hint}")
        files = files_below(root) if root.is_dir() else [root]
        size = sum(file.stat().st_size + 1 for file in files) - 1
        if size > LONGEST:  # before memory is taken
            raise UserError(f"data.path={path} has {size:,} bytes; give at most {LONGEST:,} bytes")
        text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); repair or remove it"
        ) from error
    if not text:
        raise UserError(f"data.path={path} contains no text; give a file or folder with text")
    return np.frombuffer(text, np.uint8)


def stdlib_text(split: str) -> np.ndarray:
    """The bytes of `stdlib_files`, each file followed by a newline, uint8 (N,)."""
    text = b"".join(path.read_bytes() + b"\n" for path in stdlib_files(split))
    return np.frombuffer(text, np.uint8)


def stdlib_files(split: str) -> list[Path]:
    """The .py files of a split of Python's standard library, without LEFT_OUT.

    There are about 580 files with 11 MB; they differ between versions and installations of Python.
    In the order of their paths, file 10 of every 20 (counting from 0) is in "validation", file 11
    in "test", and the others are in "train".
    """
    paths = files_below(Path(sysconfig.get_paths()["stdlib"]), LEFT_OUT)
    sources = [path for path in paths if path.suffix == ".py"]
    special = {10: "validation", 11: "test"}
    return [path for i, path in enumerate(sources) if special.get(i % 20, "train") == split]


def files_below(root: Path, left_out: Collection[str] = ()) -> list[Path]:
    """The regular files below `root`, sorted by relative path with / as the separator.

    Links are followed, but a folder that several paths reach is read once. Hidden files, hidden
    folders and folders named in `left_out` are skipped. What is not a file, such as a broken link
    or a pipe, is skipped with a warning.
    """
    files: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()
    # By default, os.walk ignores errors.
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # perhaps a cycle of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in left_out)
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            (files if path.is_file() else others).append(path)
    if others:
        warn = logging.getLogger(__name__).warning
        warn("left out, as they are no files: %d, such as %s", len(others), printable(others[0]))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def enwik8_text(data_dir: str | None = None, download: bool = True) -> np.ndarray:
    """enwik8, the first 100,000,000 bytes of an English Wikipedia dump of 2006, uint8 (N,).

    If downloads/manual in tfds.prepare.data_folder(data_dir) has neither enwik8 nor enwik8.zip, the
    archive is downloaded to downloads, once, or with `download=False` is an error. Raises a
    UserError if the archive cannot be downloaded, or the file is not enwik8.
    """
    downloads = data_folder(data_dir) / "downloads"
    archive = downloads / "enwik8.zip"
    given = (downloads / "manual" / "enwik8", downloads / "manual" / "enwik8.zip")
    path = next(filter(os.path.lexists, given), archive)
    again = "delete this file to download enwik8 again"
    try:
        if not download and not path.exists():
            raise OSError("this command downloads nothing")
        if not os.path.lexists(path):
            _download(archive)
        if not path.is_file():  # reading a pipe could block forever
            raise UserError(f"{path} is not a file; {again}")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as opened:
                size = opened.getinfo("enwik8").file_size
                content = opened.read("enwik8") if size == ENWIK8_BYTES else b""
        else:
            size = path.stat().st_size
            content = path.read_bytes() if size == ENWIK8_BYTES else b""
    # RuntimeError: encrypted, or compressed in another way.
    except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not an archive of enwik8 ({error.args[0]}); {again}") from error
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"enwik8 is not in {downloads} and could not be downloaded from {ENWIK8_URL} "
            f"({' '.join(str(error).split())}); put enwik8.zip into {downloads / 'manual'}, or set "
            "--config.data.dir to a folder that contains enwik8"
        ) from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != ENWIK8_MD5:
        raise UserError(
            f"{path} ({size} bytes) is not enwik8 ({ENWIK8_BYTES} bytes, MD5 {ENWIK8_MD5}); {again}"
        )
    return np.frombuffer(content, np.uint8)


def _download(path: Path) -> None:
    """Downloads the archive of enwik8; raises OSError or HTTPException if this fails."""
    digest, size = hashlib.sha256(), ENWIK8_ARCHIVE_BYTES
    with (
        whole_file(path) as file,
        urllib.request.urlopen(ENWIK8_URL, timeout=30) as response,
        tqdm(desc="enwik8.zip", total=size, unit="B", unit_scale=True, delay=1) as bar,
    ):
        while chunk := response.read(2**20):
            digest.update(chunk)
            bar.update(file.write(chunk))
        if bar.n != size or digest.hexdigest() != ENWIK8_SHA256:
            raise OSError("the download has the wrong size or checksum")


def _raise(error: OSError) -> None:
    raise error
