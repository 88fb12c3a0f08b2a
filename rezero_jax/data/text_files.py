"""Text from files: the user's own, the sources of Python's standard library, and enwik8."""

import hashlib
import http.client
import os
import sysconfig
import urllib.request
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rezero_jax.data.tfds.prepare import data_folder
from rezero_jax.data.tfds.source import whole_file
from rezero_jax.errors import UserError, closest_beside

# Folders of the standard library that are not read: foreign code, tests, and folders that some
# installations lack.
LEFT_OUT = {"__pycache__", "dist-packages", "site-packages", "test", "tests"}
LEFT_OUT |= {"ensurepip", "idlelib", "lib2to3", "turtledemo"}

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_ARCHIVE_BYTES = 36_445_475
ENWIK8_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"  # of the archive
# The file in the archive, as http://mattmahoney.net/dc/textdata.html describes it.
ENWIK8_BYTES = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"


def user_text(path: str | None) -> np.ndarray:
    """The bytes of a file, or of the files below a folder joined by newlines, uint8 (N,).

    Files come in the order of their paths; hidden files are skipped.

    Raises:
      UserError: there is no path, no regular file or folder at the path, or no text in it, or a
        file cannot be read.
    """
    if not path:
        raise UserError("data.name=text needs a file or folder; set --config.data.path=...")
    root = Path(path).expanduser()
    try:
        if not (root.is_file() or root.is_dir()):  # reading a pipe could wait for ever
            close = closest_beside(root)
            hint = f"did you mean {close}?" if close else "give another path"
            raise UserError(f"data.path={path} is not a file or folder; {hint}")
        files = files_below(root) if root.is_dir() else [root]
        text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); make it readable or leave it out"
        ) from error
    if not text:
        raise UserError(f"data.path={path} contains no text; give a file or folder that does")
    return np.frombuffer(text, np.uint8)


def stdlib_text(split: str) -> np.ndarray:
    """The bytes of `stdlib_files`, each file followed by a newline, uint8 (N,)."""
    text = b"".join(path.read_bytes() + b"\n" for path in stdlib_files(split))
    return np.frombuffer(text, np.uint8)


def stdlib_files(split: str) -> list[Path]:
    """The .py files of a split of Python's standard library outside LEFT_OUT.

    The library has about 580 such files and 11 MB, which differ between versions and installations
    of Python. In the order of their paths, number 10 of each 20 (counting from 0) is in
    "validation", number 11 in "test" and the others in "train".
    """
    paths = files_below(Path(sysconfig.get_paths()["stdlib"]), LEFT_OUT)
    sources = [path for path in paths if path.suffix == ".py"]
    special = {10: "validation", 11: "test"}
    return [path for i, path in enumerate(sources) if special.get(i % 20, "train") == split]


def files_below(root: Path, left_out: Collection[str] = ()) -> list[Path]:
    """The regular files below `root`, sorted by relative path with / as the separator.

    Hidden files and folders and folders named in `left_out` are skipped.
    """
    paths = []
    for folder, folders, names in os.walk(root, onerror=_raise):  # by default it skips errors
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, paths), key=lambda path: path.relative_to(root).as_posix())


def enwik8_text(data_dir: str | None = None) -> np.ndarray:
    """enwik8, the first 100,000,000 bytes of an English Wikipedia dump of 2006, uint8 (N,).

    The folder downloads/manual of tfds.prepare.data_folder(data_dir) may contain enwik8 or
    enwik8.zip. Otherwise the archive is downloaded to the folder downloads, once.

    Raises:
      UserError: the archive cannot be downloaded, or the file that was found is not enwik8.
    """
    downloads = data_folder(data_dir) / "downloads"
    archive = downloads / "enwik8.zip"
    given = (downloads / "manual" / "enwik8", downloads / "manual" / "enwik8.zip")
    path = next(filter(Path.exists, given), archive)
    again = "delete that file to have enwik8 downloaded again"
    try:
        if not path.exists():
            _download(archive)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as opened:
                content = opened.read("enwik8")
        else:
            content = path.read_bytes()
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is not an archive of enwik8 ({error.args[0]}); {again}") from error
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"enwik8 is not in {downloads} and could not be downloaded from {ENWIK8_URL} "
            f"({' '.join(str(error).split())}); put enwik8.zip into {downloads / 'manual'}, or set "
            "--config.data.dir to a folder that has it"
        ) from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != ENWIK8_MD5:
        raise UserError(
            f"the text in {path}, of {len(content)} bytes, is not enwik8, which has {ENWIK8_BYTES} "
            f"and the MD5 checksum {ENWIK8_MD5}; {again}"
        )
    return np.frombuffer(content, np.uint8)


def _download(path: Path) -> None:
    """Writes the archive of enwik8; raises OSError or HTTPException if it does not arrive whole."""
    digest = hashlib.sha256()
    size = ENWIK8_ARCHIVE_BYTES
    with (
        whole_file(path) as file,
        urllib.request.urlopen(ENWIK8_URL, timeout=30) as response,
        tqdm(desc="enwik8.zip", total=size, unit="B", unit_scale=True, delay=1) as bar,
    ):
        while chunk := response.read(2**20):
            digest.update(chunk)
            bar.update(file.write(chunk))
        if bar.n != size or digest.hexdigest() != ENWIK8_SHA256:
            raise OSError("what was downloaded has the wrong size or checksum")


def _raise(error: OSError) -> None:
    raise error
