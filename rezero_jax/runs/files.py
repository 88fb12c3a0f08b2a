"""Files of a run, on a disk or in a bucket: each file is whole or absent.

A path with a scheme, such as gs://bucket/run, is in a bucket, which has no folders, renames or
locks, and whose objects are written whole and never grow.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from rezero_jax.errors import Unavailable, UserError, first_line

AnyPath = str | os.PathLike[str]

STAGED = re.compile(r"\..*\.[0-9a-f]{32}")  # a hidden folder of a process that is writing
PATIENCE = 6.0  # seconds in which a bucket must answer when a run starts
PERIOD = 1.0  # seconds between two copies; Cloud Storage takes one write a second of an object
SHARE = 0.05  # of the time, at most, that copying at log lines takes


def is_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def folder_of(path: AnyPath) -> epath.Path:
    """The absolute path of a run's folder; ~ is the user's home.

    Raises:
      UserError: the path is in a bucket that does not exist or denies access.
      Unavailable: the path is in a bucket that does not answer.
    """
    if is_bucket(path):
        _check_bucket(path)
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.path.expanduser(path)))


def _check_bucket(path: AnyPath) -> None:
    errors: list[Exception] = [TimeoutError(f"no answer within {PATIENCE:.0f} s")]

    def ask() -> None:
        try:
            # Others write to the bucket too, such as TensorStore: a cached listing may be outdated.
            storage = epath.backend.fsspec_backend.fs(path)
            storage.dircache.use_listings_cache = False
            storage.invalidate_cache()
            if not ((epath.Path(path) / "config.json").exists() or _bucket_of(path).exists()):
                raise FileNotFoundError("no such bucket")
            errors.clear()
        except Exception as error:  # Each library for buckets raises errors of its own.
            errors[0] = error

    # In a thread, because the libraries for buckets retry for longer than a user waits.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if errors:
        raise storage_error(path, errors[0]) from errors[0]


def _bucket_of(path: AnyPath) -> epath.Path:
    scheme, _, rest = os.fspath(path).partition("://")
    return epath.Path(f"{scheme}://{rest.split('/')[0]}")


def storage_error(folder: AnyPath, error: Exception) -> UserError:
    """The error for a workdir whose storage failed with `error`, at the start or later."""
    text, why = str(error), getattr(error, "strerror", None) or first_line(error)
    if not is_bucket(folder):
        return UserError(
            f"cannot write to the workdir {folder} ({why}); make room or repair it, and the same "
            "command resumes, or choose another --workdir"
        )
    bucket = _bucket_of(folder)
    if is_outage(folder, error):
        return Unavailable(
            f"{bucket} does not answer ({why}); the same command starts or resumes the run later"
        )
    if isinstance(error, FileNotFoundError):
        advice = "there is no such bucket; make it, or choose another --workdir"
    elif "Forbidden" in text or "403" in text:
        advice = "no permission; give this account roles/storage.admin on the bucket"
    elif any(word in text for word in ("401", "Credentials", "credentials")):
        advice = "no valid credentials; run `gcloud auth application-default login`"
    else:
        advice = f"{why}; check its name and your access"
    return UserError(f"cannot use {bucket}: {advice}")


def is_of_storage(error: Exception) -> bool:
    """Whether a disk or a bucket failed: each library for buckets has errors of its own."""
    libraries = ("aiohttp", "botocore", "gcsfs", "google")
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries


def is_outage(path: AnyPath, error: BaseException | None) -> bool:
    """Whether `error`, or an error from which it was raised, is an outage of the bucket of `path`.

    Such an error says nothing about the content of the bucket.
    """
    if not is_bucket(path):
        return False
    from gcsfs.retry import is_retriable  # only for buckets
    from google.auth.exceptions import TransportError

    outages = (TransportError, TimeoutError, ConnectionError)
    while error is not None:
        # TensorStore's errors have no type of their own.
        is_unavailable = str(error).startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED"))
        if is_unavailable or is_retriable(error) or isinstance(error, outages):
            return True
        error = error.__cause__
    return False


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file of a run; raises a UserError if it is missing or broken."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(
            f"{file.parent} holds no run: there is no {file.name} in it; train there first"
        )
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is broken ({first_line(error)}); restore it from a copy, or choose another "
            "run folder"
        ) from None
    return content


def write_json(path: AnyPath, content: Any) -> None:
    """Writes a JSON file in one step; see `replace_file`."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


def replace_file(path: AnyPath, text: str) -> None:
    """Replaces a file in one step: a reader finds either the old text or the new text."""
    if is_bucket(path):
        epath.Path(path).write_text(text)
        return
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


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
            return new.replace(folder) if is_new else _exchange(new, folder)
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


class Upload:
    """For files that grow: a local folder that is copied to a bucket; on a disk, `home` itself.

    Attributes:
      folder: where to write.
      is_copied: whether `folder` is not `home`.

    Args:
      home: a folder of the run.
      check: called before each copy; raises an error if this start may no longer write.
    """

    def __init__(self, home: AnyPath, check: Callable[[], None] = lambda: None):
        self._home, self._check = epath.Path(home), check
        self.is_copied = is_bucket(home)
        self.folder = Path(home)
        self._copied: dict[Path, tuple[int, int]] = {}  # size and time of what the bucket has
        self._next = 0.0
        if self.is_copied:
            self._local = tempfile.TemporaryDirectory(prefix="rezero_jax-run-")
            self.folder = Path(self._local.name)

    def is_due(self) -> bool:
        """Whether the bucket can take another copy now."""
        return self.is_copied and time.monotonic() >= self._next

    def flush(self) -> None:
        """Copies the files that have changed; raises the errors of the library for buckets."""
        if not self.is_copied:
            return
        started = time.monotonic()
        self._check()
        for path in sorted(self.folder.rglob("*")):
            status = path.stat()
            now = (status.st_size, status.st_mtime_ns)
            if path.is_file() and self._copied.get(path) != now:
                target = self._home / path.relative_to(self.folder).as_posix()
                target.write_bytes(path.read_bytes())
                self._copied[path] = now
        ended = time.monotonic()
        self._next = ended + max(PERIOD, (ended - started) / SHARE)

    def close(self) -> None:
        """Does `flush`, and removes the local folder."""
        try:
            self.flush()
        finally:
            if self.is_copied:
                self._local.cleanup()
