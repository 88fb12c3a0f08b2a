"""What a run writes while it trains: files that grow, which a bucket has as copies."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

from etils import epath

from rezero_jax.runs.files import AnyPath, is_bucket

PERIOD = 1.0  # seconds between two copies; Cloud Storage takes one a second of an object
SHARE = 0.05  # of the time, at most, that copying takes
PREFIX = "rezero_jax-run-"  # of the local folders' names


class Outbox:
    """A local folder whose files are copied to the workdir, a second after they change.

    Where the workdir is no bucket, it is the folder.

    Attributes:
      folder: where to write.
      is_copied: whether that is not the workdir itself.

    Args:
      home: the workdir.
    """

    def __init__(self, home: AnyPath):
        self._home = epath.Path(home)
        self.is_copied = is_bucket(home)
        self.folder = Path(home)
        self._copied: dict[Path, tuple[int, int]] = {}  # size and time of what the bucket has
        self._lock, self._closed = threading.Lock(), threading.Event()
        if self.is_copied:
            _remove_abandoned()
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._held = _hold(self.folder)
            self._thread = threading.Thread(target=self._keep_copying, daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Returns when the workdir has everything that was written here.

        Raises:
          OSError: the bucket does not take it.
        """
        if not self.is_copied:
            return
        with self._lock:
            for path in sorted(self.folder.rglob("*")):
                status = path.stat()
                now = (status.st_size, status.st_mtime_ns)
                if path.is_file() and self._copied.get(path) != now:
                    target = self._home / path.relative_to(self.folder).as_posix()
                    target.write_bytes(path.read_bytes())
                    self._copied[path] = now

    def _keep_copying(self) -> None:
        pause = PERIOD
        while not self._closed.wait(pause):
            started = time.perf_counter()
            with contextlib.suppress(Exception):  # `flush` raises it to the loop at the next save
                self.flush()
            pause = max(PERIOD, (time.perf_counter() - started) / SHARE)

    def close(self) -> None:
        """Flushes, and removes the local folder.

        Raises:
          OSError: the bucket does not take it.
        """
        if not self.is_copied or self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        try:
            self.flush()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._held)


def _hold(folder: Path) -> int:
    """Locks a folder until its descriptor, which is returned, is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned() -> None:
    """Removes the local folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is held, or another user's
            if time.time() - folder.stat().st_mtime > 60.0:  # a younger one is perhaps not held yet
                held = _hold(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
