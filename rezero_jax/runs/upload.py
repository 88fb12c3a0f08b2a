"""Files that grow while a run trains: in a bucket, copies of a local folder."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from rezero_jax.runs.files import AnyPath, is_bucket

PERIOD = 1.0  # seconds between two copies; Cloud Storage takes one write a second of an object
SHARE = 0.05  # of the time, at most, that copying at log lines takes


class Upload:
    """A local folder whose files are copied to a folder in a bucket; elsewhere, that folder itself.

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
        """Copies what has changed.

        Raises:
          OSError: the bucket does not take it; libraries also raise errors of their own.
        """
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
        """Copies what has changed, and removes the local folder.

        Raises:
          OSError: see `flush`.
        """
        if not self.is_copied:
            return
        try:
            self.flush()
        finally:
            self._local.cleanup()
