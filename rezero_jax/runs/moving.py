"""Folders of a run or of an exported model: moved, copied, and replaced in one step."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from etils import epath

from rezero_jax.runs.files import AnyPath, is_bucket

STAGED = re.compile(r"\..*\.[0-9a-f]{32}")  # a hidden folder of a process that is writing


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder, and replaces a folder that is already there."""
    target.rmtree(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_bucket(source):
        copy_folder(source, target)
        source.rmtree()
    else:
        source.rename(target)


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder and everything in it, also between a disk and a bucket."""
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name).write_bytes(path.read_bytes())


def replace_folder(path: AnyPath, files: Mapping[str, bytes]) -> None:
    """Makes a folder of these files, or replaces one that has no others.

    This is one step if the system can exchange folders. In a bucket, at a mount point and in the
    current folder, the files are written one after another.
    """
    if is_bucket(path):
        for name, content in files.items():
            (epath.Path(path) / name).write_bytes(content)
        return
    folder = Path(os.path.realpath(path))
    is_new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _staged(folder.parent, folder.name, files) as new:
            if is_new:
                new.replace(folder)
            else:
                _exchange(new, folder)
            return
    except OSError:
        if is_new:
            raise
    with _staged(folder, folder.name, files) as new:
        for name in files:
            (new / name).replace(folder / name)  # a link is replaced, not followed


@contextlib.contextmanager
def _staged(parent: Path, name: str, files: Mapping[str, bytes]) -> Iterator[Path]:
    """A hidden folder with these files, removed in the end, as are those of killed processes."""
    lock = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # The file system may have no locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in parent.iterdir():
            if left.name.startswith(f".{name}.") and STAGED.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        new = parent / f".{name}.{uuid.uuid4().hex}"
        try:
            new.mkdir()
            for file, content in files.items():
                (new / file).write_bytes(content)
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)
    finally:
        os.close(lock)


def _exchange(new: Path, old: Path) -> None:
    """Exchanges two folders in one step; raises an OSError if the system cannot."""
    if Path.cwd().is_relative_to(old):
        raise OSError(errno.EBUSY, "this is the current folder")
    shutil.copymode(old, new)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # of Linux
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = (here, os.fsencode(new), here, os.fsencode(old))
    if renameat2 is None or renameat2(*paths, exchange):
        raise OSError(ctypes.get_errno(), "folders cannot be exchanged")
