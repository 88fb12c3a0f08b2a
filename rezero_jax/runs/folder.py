"""The workdir of a run: its files, and who may write them.

.lock              the identifier of the newest start
config.json        the config, with model.dtype resolved
data.json          the data: names, shapes, classes, statistics, counts and hashes of the content
environment.json   versions, device and commit of the last start, and the wall seconds before it
init_from.json     the source of the initial parameters, if train.init_from names one
metrics.jsonl      one line per logged step, flushed
tensorboard/       the same numbers as TensorBoard events
checkpoints/       see rezero_jax.runs.checkpoint
final.json         last and best metrics, steps, seconds, goodput, examples/s, parameters, status
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from etils import epath
from ml_collections import ConfigDict

from rezero_jax import devices, processes
from rezero_jax.config import LENGTHS, differences, flatten
from rezero_jax.errors import UserError
from rezero_jax.runs.files import (
    AnyPath,
    folder_of,
    is_bucket,
    is_of_storage,
    read_json,
    storage_error,
    write_json,
)
from rezero_jax.runs.metrics import read_metrics

# Prefixes of fields that may change between two starts: where and on how much hardware a run is.
# `check_data` notices other data in another place.
TOPOLOGY = ("mesh.", "data.dir", "data.path", "data.stream", "data.workers")
# Prefixes of fields that an evaluation may set to other values than the run.
EVALUATION = ("eval.", "data.context", "data.eval_split")
# Fields in which a longer run differs from the run that it lengthens, as `differences` begins them.
LENGTH_FIELDS = tuple(f"train.{field}:" for field in LENGTHS["train"])
LOCK = ".lock"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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
      config: the config of the run.
      data: what to record of its data, see `check_data`.
      lengthened: whether the run in the folder may be a shorter one, see `start.lengthens`.

    Raises:
      UserError: the folder cannot be written, has a path that Orbax cannot read, belongs to another
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
        if set("*?[").intersection(os.fspath(self.folder)):  # Orbax takes the path for a pattern.
            raise UserError(
                f"Orbax cannot restore a checkpoint from {self.folder}, whose path has one of the "
                "characters * ? [; choose another --workdir"
            )
        self._lock: TextIO | None = None
        try:
            self._id, self.final = processes.on_first(
                lambda: self._claim(folder, config, data or {}, lengthened)
            )
            if not processes.agree((self.folder / "config.json").exists()):
                raise UserError(
                    f"not every process finds the workdir {folder}; choose a --workdir on storage "
                    "that all hosts share"
                )
        except BaseException:
            self.release()
            raise

    def _claim(
        self, folder: AnyPath, config: ConfigDict, data: Mapping[str, Any], lengthened: bool
    ) -> tuple[str, dict[str, Any] | None]:
        identifier = uuid.uuid4().hex
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not is_bucket(folder):
                self._lock = open(self.folder / LOCK, "a")  # noqa: SIM115
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"another process is training in {folder}; wait or stop it"
                    ) from None
                except OSError:  # The file system has no locks: `check` keeps two starts apart.
                    pass
            if not _is_begun(self.folder) and (self.folder / "environment.json").exists():
                # Left by a start that ended before its first update.
                for name in ("config.json", "data.json"):
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
            (self.folder / LOCK).write_text(identifier)  # in place, as the lock is on this file
            if lengthened:
                (self.folder / "final.json").unlink(missing_ok=True)
            if not (self.folder / "data.json").exists():
                write_json(self.folder / "data.json", data)
            write_json(self.folder / "config.json", json.loads(config.to_json()))
            seconds = {"seconds": _recorded_seconds(self.folder)}
            write_json(self.folder / "environment.json", environment() | seconds)
        except Exception as error:
            if not is_of_storage(error):
                raise
            raise storage_error(folder, error) from error
        return identifier, None

    def check(self) -> None:
        """Raises a UserError if a newer start has claimed the folder; called before each write."""
        lock = self.folder / LOCK
        if lock.exists() and lock.read_text() != self._id:
            raise UserError(
                f"another start of this run has taken over {self.folder}; this older one stops and "
                "writes nothing more"
            )

    def release(self) -> None:
        """Unlocks the folder for another run."""
        if self._lock is not None:
            self._lock.close()


def _is_begun(folder: epath.Path) -> bool:
    """Whether a run in the folder has made updates, and left something to keep."""
    lines = folder / "metrics.jsonl"
    has_lines = lines.exists() and bool(lines.read_text())
    has_more = any((folder / name).exists() for name in ("final.json", "damaged"))
    return has_lines or has_more or bool(saved_steps(folder))


def check_config(
    folder: AnyPath,
    config: ConfigDict,
    free: tuple[str, ...] = TOPOLOGY,
    advice: str = "choose another --workdir or the old settings",
) -> None:
    """Checks that the run in a folder, if there is one, has this config, see `continued`.

    Args:
      free: prefixes of the fields that may differ.
      advice: what the user should do.

    Raises:
      UserError: the run has another config, or its config.json is broken.
    """
    if not (epath.Path(folder) / "config.json").exists():
        return
    both = (recorded_config(folder), continued(folder, config))
    old, new = (json.loads(one.to_json()) for one in both)
    changes = [change for change in differences(old, new) if not change.startswith(free)]
    if changes:
        raise UserError(f"{folder} holds a run of another config ({'; '.join(changes)}); {advice}")


def check_data(folder: AnyPath, data: Mapping[str, Any]) -> None:
    """Checks that the run in a folder, if there is one, was trained on the same data.

    Args:
      data: the record of the data, see `Dataset.record`. What only one of the two records has, such
        as the hash of pixels that are streamed, is not compared.

    Raises:
      UserError: the data are others, or data.json is broken.
    """
    old, new = flatten(recorded_data(folder)), flatten(json.loads(json.dumps(data)))
    both = old.keys() & new.keys() - {"passed"}
    changed = sorted(key for key in both if old[key] != new[key])
    if changed:
        changes = (f"{key}: {str(old[key])[:80]!r} -> {str(new[key])[:80]!r}" for key in changed)
        raise UserError(
            f"{folder} holds a run on other data ({'; '.join(changes)}); restore the data or name "
            "the data of the run, or choose another --workdir"
        )


def recorded_data(folder: AnyPath) -> dict[str, Any]:
    """The record of the data of the run in a folder; empty if there is none."""
    path = folder_of(folder) / "data.json"
    return read_json(path) if path.exists() else {}


def check_passed(folder: AnyPath, passed: bool) -> None:
    """Raises a UserError if the run needs a data set that its config does not name.

    Args:
      passed: whether the caller passes a data set, as the caller of `train` did.
    """
    recorded = recorded_data(folder)
    if recorded.get("passed") and not passed:
        raise UserError(
            f'{folder} holds a run on the data set "{recorded.get("name")}", which was passed to '
            "train() in Python; pass it as dataset= again"
        )


def recorded_config(folder: AnyPath) -> ConfigDict:
    """The config of the run in a folder, to read fields of it; to make its model, see `load`."""
    return ConfigDict(read_json(folder_of(folder) / "config.json"))


def continued(folder: AnyPath, config: ConfigDict) -> ConfigDict:
    """A copy of `config` in which model.dtype="auto" is the dtype of the run in `folder`, if any.

    So a run that began on an accelerator keeps its dtype on a CPU.
    """
    config = config.copy_and_resolve_references()
    if config.model.get("dtype") == "auto" and (folder_of(folder) / "config.json").exists():
        with config.unlocked():
            config.model.dtype = recorded_config(folder).model.dtype
    return config


def _recorded_seconds(folder: epath.Path) -> float:
    path = folder / "environment.json"
    start = read_json(path) if path.exists() else {}
    lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return max(record.get("seconds", 0.0) for record in (start, *lines))


def saved_steps(folder: AnyPath) -> list[int]:
    """Steps of a run's finished checkpoints, ascending."""
    checkpoints = epath.Path(folder) / "checkpoints"
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    if is_bucket(checkpoints):  # On a disk, Orbax renames a finished checkpoint to its number.
        found = [path for path in found if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in found)


def read_final(folder: AnyPath) -> dict[str, Any]:
    """final.json of a run that finished or diverged; empty while the run has not ended."""
    path = epath.Path(folder) / "final.json"
    return read_json(path) if path.exists() else {}


def environment() -> dict[str, Any]:
    """Versions, device and commit, as far as they can be known."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "machine": f"{devices.processor()}, {os.cpu_count()} cores",
        "commit": _commit(Path(__file__).parents[1]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(package: Path) -> str | None:
    """The commit of this project's repository; None if the package is in another one or in none."""
    git = ["git", "-C", str(package), "rev-parse", "--show-prefix", "HEAD", ":./__init__.py"]
    # Variables such as GIT_DIR, which Git sets in hooks, would name another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(git, env=env, capture_output=True, text=True, timeout=10, check=True)
        prefix, commit, _ = done.stdout.splitlines()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return commit if prefix == f"{package.name}/" else None


def device(environment: dict[str, Any]) -> str:
    """The hardware in an `environment`, in a few words."""
    if environment["device"] == "cpu":
        return str(environment["machine"])
    return f"{environment['devices']} x {environment['device']}"
