"""The workdir of a run: its files, and who may write them.

.lock              the identifier of the newest start
config.json        the config, with model.dtype resolved
dataset.json       the data: names, shapes, classes, statistics, counts and hashes of the content
environment.json   versions, device and commit of the last start, and the wall seconds before it
init_from.json     the source of the initial parameters, if train.init_from names one
metrics.jsonl      one line per logged step, flushed
tensorboard/       the same numbers as TensorBoard events
checkpoints/       see rezero_jax.runs.checkpoint
final.json         last and best metrics, steps, seconds, goodput, examples/s, parameters, status
"""

import fcntl
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from rezero_jax import processes
from rezero_jax.errors import UserError
from rezero_jax.runs.files import (
    AnyPath,
    folder_of,
    is_bucket,
    open_file,
    read_text,
    write_json,
    writing,
)
from rezero_jax.runs.folder import (
    LENGTH_FIELDS,
    TOPOLOGY,
    check_config,
    check_data,
    environment,
    read_environment,
    read_final,
    saved_steps,
)
from rezero_jax.runs.metrics import read_metrics

LOCK = ".lock"
FOLDERS = ("checkpoints", "damaged", "profile", "tensorboard")


class Workdir:
    """The folder of one run, written by the first process of one start of the run at a time.

    On a disk, a lock of the operating system refuses a second start while the first one runs. Where
    there is no such lock, as in a bucket, the newest start wins: it writes its identifier into
    .lock, and an older start finds it with its next `check` and stops.

    Attributes:
      folder: its absolute path.
      final: final.json of a finished run, or None.

    Args:
      folder: the workdir, made if it does not exist.
      data: what to record of its data, see `check_data`.
      lengthened: whether the run in the folder may be a shorter one, see `start.lengthens`.

    Raises:
      UserError: the folder cannot be written, has a name that Orbax cannot use, belongs to another
        config or other data, lacks files of a finished run, is in use, or is not shared by all
        processes.
    """

    def __init__(
        self,
        folder: AnyPath,
        config: ConfigDict,
        data: Mapping[str, Any] | None = None,
        lengthened: bool = False,
    ):
        self.folder = folder_of(folder)
        if not is_bucket(self.folder) and ":/" in f"{self.folder}/":
            raise UserError(
                f"a name in {self.folder} ends with a colon, which Orbax refuses; choose another"
            )
        self._lock: int | None = None
        try:
            self._id, self.final = processes.on_first(
                lambda: self._claim(folder, config, data or {}, lengthened)
            )
            if not processes.agree((self.folder / "config.json").exists()):
                raise UserError(
                    f"not every process finds the workdir {folder}; choose one that all hosts share"
                )
        except BaseException:
            self.release()
            raise

    def _claim(
        self, folder: AnyPath, config: ConfigDict, data: Mapping[str, Any], lengthened: bool
    ) -> tuple[str, dict[str, Any] | None]:
        identifier = uuid.uuid4().hex
        with writing(folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not is_bucket(folder):
                _refuse_links(self.folder)
                self._lock = open_file(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"another process is training in {folder}; wait or stop it"
                    ) from None
                except OSError:  # The file system has no locks: `check` keeps two starts apart.
                    pass
                for left in self.folder.glob(".*.json*.tmp"):  # by starts that were killed
                    left.unlink(missing_ok=True)
            if not _is_begun(self.folder) and (self.folder / "environment.json").exists():
                # Left by a start that ended before its first update.
                for name in ("config.json", "dataset.json"):
                    (self.folder / name).unlink(missing_ok=True)
            check_config(self.folder, config, TOPOLOGY + LENGTH_FIELDS * lengthened)
            check_data(self.folder, data)
            final = read_final(self.folder)
            if final.get("status") == "finished" and not lengthened:
                names = ("config.json", "checkpoints")
                if missing := [name for name in names if not (self.folder / name).exists()]:
                    raise UserError(
                        f"the run in {folder} has finished, but lacks {' and '.join(missing)}; "
                        "restore what is missing, or choose another --workdir"
                    )
                return identifier, final
            if self._lock is None:
                (self.folder / LOCK).write_text(identifier)
            else:  # in place, as the lock is on this file
                os.ftruncate(self._lock, 0)
                os.write(self._lock, identifier.encode())
            if lengthened:
                (self.folder / "final.json").unlink(missing_ok=True)
            if not (self.folder / "dataset.json").exists():
                write_json(self.folder / "dataset.json", data)
            write_json(self.folder / "config.json", json.loads(config.to_json()))
            seconds = {"seconds": _recorded_seconds(self.folder)}
            write_json(self.folder / "environment.json", environment() | seconds)
        return identifier, None

    def check(self) -> None:
        """Raises a UserError if a newer start has claimed the folder; called before each write."""
        lock = self.folder / LOCK
        with writing(self.folder):
            if lock.exists() and read_text(lock) != self._id:
                raise UserError(
                    f"another start of this run has taken over {self.folder}; this one stops"
                )

    def release(self) -> None:
        """Unlocks the folder for another run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _refuse_links(folder: epath.Path) -> None:
    """Raises a UserError for a link through which a run would write outside its folder."""
    paths = [folder / name for name in (LOCK, *FOLDERS)]
    for top in paths[1:]:
        for parent, folders, files in () if os.path.islink(top) else os.walk(top):
            paths += [Path(parent, name) for name in (*folders, *files)]
    if links := [path for path in paths if os.path.islink(path)]:
        raise UserError(
            f"{links[0]} is a link, and a run writes only within its folder; remove it, or choose "
            "another --workdir"
        )


def _is_begun(folder: epath.Path) -> bool:
    """Whether a run in the folder has made updates, and left something to keep."""
    has_more = any((folder / name).exists() for name in ("final.json", "damaged"))
    return has_more or bool(_lines(folder) or saved_steps(folder))


def _lines(folder: epath.Path) -> list[dict[str, float]]:
    is_there = (folder / "metrics.jsonl").exists()
    return read_metrics(folder, lambda _: None) if is_there else []


def _recorded_seconds(folder: epath.Path) -> float:
    path = folder / "environment.json"
    start = read_environment(folder)["seconds"] if path.exists() else 0.0
    return max(start, *(line.get("seconds", 0.0) for line in _lines(folder)), 0.0)
