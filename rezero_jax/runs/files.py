"""Files of a run, on a disk or in a bucket: each file is whole or absent.

A path with a scheme, such as gs://bucket/run, is in a bucket, which has no folders, renames or
locks, and whose objects are written whole and never grow.
"""

import contextlib
import glob
import json
import os
import re
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from rezero_jax.errors import Unavailable, UserError, first_line

AnyPath = str | os.PathLike[str]

PATIENCE = 6.0  # seconds in which a bucket must answer when a run starts
PERIOD = 1.0  # seconds between two copies; Cloud Storage takes one write a second of an object
SHARE = 0.05  # of the time, at most, that copying at log lines takes
MOST = 2**25  # bytes of a JSON file or of a line of metrics.jsonl


class DiskPath(type(epath.Path())):  # type: ignore[misc]
    """A path on a disk, which may have any name."""

    _uri_scheme = None  # epath takes /gs/run for gs://run.

    def glob(self, pattern: str) -> Iterator["DiskPath"]:
        """The paths below this folder that match; epath takes the folder's name for a pattern."""
        literal = glob.escape(os.fspath(self))
        return (type(self)(found) for found in glob.iglob(os.path.join(literal, pattern)))


def is_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return re.match(r"\w+://", os.fspath(path)) is not None


def path_of(path: AnyPath) -> epath.Path:
    """The absolute path of a file or folder, on a disk or in a bucket; ~ is the user's home.

    Raises a UserError without a home or a current folder, or if the path is not UTF-8 (for Orbax).
    """
    if is_bucket(path):
        return epath.Path(path)
    expanded = os.path.expanduser(path)
    if os.fspath(expanded).split(os.sep)[0] == "~":
        raise UserError(f"no home folder is known for {path}; write the path without ~")
    try:
        absolute = os.path.abspath(expanded)
        os.fspath(absolute).encode()
    except FileNotFoundError:
        raise UserError("the current folder was deleted; change to another one") from None
    except UnicodeEncodeError:
        raise UserError(f"{os.fspath(path)!r} is not UTF-8; name another file or folder") from None
    return DiskPath(absolute)


def folder_of(path: AnyPath) -> epath.Path:
    """The `path_of` a run's folder, whose storage answers.

    Raises:
      UserError: the path is in a bucket that does not exist or denies access.
      Unavailable: the path is in a bucket that does not answer.
    """
    if is_bucket(path):
        _check_bucket(path)
    return path_of(path)


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


@contextlib.contextmanager
def writing(folder: AnyPath) -> Iterator[None]:
    """Raises errors of the storage within the context as the `storage_error` of a workdir."""
    libraries = ("aiohttp", "botocore", "gcsfs", "google")  # for buckets, with errors of their own
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in libraries:
            raise
        raise storage_error(folder, error) from error


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


def open_file(path: AnyPath, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a regular file on a disk; a pipe or a device raises an OSError at once."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a file")
    return descriptor


def read_text(path: AnyPath) -> str:
    """The text of a small file; raises an OSError, or a ValueError if it is not UTF-8 or large."""
    if is_bucket(path):
        return epath.Path(path).read_text()
    with open(open_file(path), "rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise ValueError(f"it is larger than {MOST:,} bytes")
    return content.decode()


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file of a run; raises a UserError if it is missing or broken."""
    file = path_of(path)
    if not file.exists():
        raise UserError(f"{file.parent} holds no run: it has no {file.name}; train there first")
    try:
        content = json.loads(read_text(file))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise broken(path, first_line(error)) from None
    return content


def broken(path: AnyPath, why: str) -> UserError:
    """The error for a file of a run that is not what a run writes."""
    return UserError(f"{path} is broken ({why}); restore it from a copy, or choose another run")


def write_json(path: AnyPath, content: Any) -> None:
    """Writes a JSON file in one step; see `replace_file`."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


def replace_file(path: AnyPath, content: str | bytes) -> None:
    """Replaces a file, or a link, in one step: a reader finds the old content or the new one."""
    target, data = path_of(path), content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        target.write_bytes(data)
        return
    temporary = target.parent / f".{target.name[:64]}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:  # follows no link
            file.write(data)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Upload:
    """For files that grow: a local folder that is copied to a bucket; on a disk, `home` itself.

    Write to `folder`; `is_copied` is whether it is not `home`, a folder of the run. `check` is
    called before each copy, and raises an error if this start may no longer write.
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
