"""One run in a workdir: a lock of the operating system, or in a bucket, which has none, a lease."""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

import tensorstore as ts

from rezero_jax.errors import UserError
from rezero_jax.runs.files import AnyPath, is_bucket

NAME = ".lock"
BEAT = 5.0  # seconds between two signs of life of a lease's holder
PATIENCE = 30.0  # seconds without one after which a lease is free


class Lock:
    """Held by this process until `release`, and given up by a process that ends in whatever way.

    Args:
      folder: a workdir.

    Raises:
      UserError: another process holds it.
      OSError: nothing can be written there.
    """

    def __init__(self, folder: AnyPath):
        self._holder = _Lease(folder) if is_bucket(folder) else _locked(folder)

    def release(self) -> None:
        """Lets the next run begin."""
        self._holder.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never held
            self.release()


def _locked(folder: AnyPath) -> TextIO:
    file = Path(folder, NAME).open("w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise in_use(folder) from None
    return file


def in_use(folder: AnyPath) -> UserError:
    """The error for a workdir that another run holds."""
    return UserError(f"another process is training in {folder}; wait or stop it")


class _Lease:
    """An object that its holder rewrites every BEAT seconds, by writes that fail if another did.

    Whoever wants it waits until it has not changed for PATIENCE seconds by his own clock, unless
    the holder is a process of this machine, which runs or has ended.

    Args and Raises: see `Lock`.
    """

    def __init__(self, folder: AnyPath):
        self._folder = folder
        self._store = ts.KvStore.open(f"{folder}/").result()
        self._owner = {"id": uuid.uuid4().hex, "host": socket.gethostname()} | _this_process()
        self._beats = 0
        self._closed = threading.Event()
        found = self._store.read(NAME).result()
        if found.state == "value":
            lives = _lives(found.value)
            if lives:
                raise in_use(folder)
            found = self._after_silence(found) if lives is None else found
        self._generation = found.stamp.generation
        if not self._beat():
            raise in_use(folder)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _after_silence(self, found: ts.KvStore.ReadResult) -> ts.KvStore.ReadResult:
        """The object once it is free."""
        print(
            f"{self._folder} was in use; waiting {PATIENCE:.0f} s for a sign of life of its run",
            file=sys.stderr,
        )
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(BEAT / 5)
            now = self._store.read(NAME).result()
            if now.state != "value":
                return now
            if now.stamp.generation != found.stamp.generation:
                raise in_use(self._folder)
        return found

    def _beat(self) -> bool:
        """Writes the next sign of life; False if the lease has gone to another process."""
        self._beats += 1
        content = json.dumps(self._owner | {"beats": self._beats}).encode()
        stamp = self._store.write(NAME, content, if_equal=self._generation).result()
        if not stamp.generation:
            # A write whose answer is lost is made again, and then finds itself in the way.
            found = self._store.read(NAME).result()
            if found.value != content:
                return False
            stamp = found.stamp
        self._generation = stamp.generation
        return True

    def _keep(self) -> None:
        while not self._closed.wait(BEAT):
            with contextlib.suppress(ValueError, OSError):  # TensorStore's, after many tries
                if not self._beat():
                    text = f"\ntrain.py: {in_use(self._folder)}, as this one was silent too long\n"
                    os.write(2, text.encode())
                    os._exit(2)

    def close(self) -> None:
        """Deletes the object."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(PATIENCE)
        with contextlib.suppress(ValueError, OSError):
            self._store.write(NAME, None, if_equal=self._generation).result(PATIENCE)


def _this_process() -> dict[str, Any]:
    """What tells this process from all others that run, have run and will run, on Linux."""
    with contextlib.suppress(OSError):
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "space": os.readlink("/proc/self/ns/pid"),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
        }
    return {}


def _start_of(pid: int) -> str:
    # The 22nd field of all, the 20th after the name, which may hold spaces and parentheses.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _lives(lease: bytes) -> bool | None:
    """Whether a lease's holder runs; None where that cannot be known, as on another machine."""
    if not lease:  # the lock of a disk, copied here with its run
        return False
    owner, here = json.loads(lease), _this_process()
    if "boot" not in here or any(owner.get(key) != here[key] for key in ("boot", "space")):
        return None
    try:
        return _start_of(owner["pid"]) == owner["started"]
    except OSError:
        return False
