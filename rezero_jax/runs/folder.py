"""The workdir holds all of a run; everything that plots or compares reads these files.

config.json        the config, resolved
environment.json   versions, device and commit of the last start, and the wall seconds before it
metrics.jsonl      one line per logged step, flushed
tensorboard/       the same numbers as TensorBoard events
checkpoints/       see rezero_jax.runs.checkpoint
final.json         last and best metrics, steps, seconds, goodput, examples/s, parameters, status
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from rezero_jax import devices, processes
from rezero_jax.config import base_config
from rezero_jax.errors import UserError
from rezero_jax.fields import differences, flatten
from rezero_jax.runs.files import (
    AnyPath,
    absolute,
    folder_of,
    is_bucket,
    is_of_storage,
    read_json,
    unreachable,
    write_json,
)
from rezero_jax.runs.lock import NAME as LOCK
from rezero_jax.runs.lock import Lock
from rezero_jax.runs.metrics import read_metrics

# Fields that may change between two starts: where and on how much hardware a run happens.
TOPOLOGY = ("mesh.", "data.dir", "data.stream", "data.workers")
# Fields that an evaluation may set to other values than the run.
EVALUATION = ("eval.", "data.context", "data.eval_split")
# What runs that are older than a field did, where that is not the field's default.
LEGACY: dict[str, object] = {}
# What younger fields of a model that is no ResNet say of older runs.
YOUNGER = {"norm": "layer_norm", "base_depth": 2}
# Values that leave a field as the run began.
OPEN = {"model.dtype": "auto", "model.alpha_init": None}
# What a start writes before the first update.
CONTENTS = (
    LOCK,
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
    """The folder of one run, held by this run alone until it ends.

    The first of several processes holds and writes it; the others must see it too.

    Attributes:
      folder: its absolute path.
      final: final.json of a finished run, or None.

    Args:
      folder: made if need be.
      config: of the run.

    Raises:
      UserError: the folder cannot be written, belongs to another config, lacks what a finished run
        has, is in use, or is not on storage that all processes share. Every process raises it.
    """

    def __init__(self, folder: AnyPath, config: ConfigDict):
        self.folder = absolute(folder_of(folder))
        self.final = processes.on_first(lambda: self._claim(folder, config))
        if not processes.agree((self.folder / "config.json").exists()):
            raise UserError(
                f"not every process finds the workdir {folder}; choose a --workdir on storage that "
                "all hosts share"
            )

    def _claim(self, folder: AnyPath, config: ConfigDict) -> dict[str, Any] | None:
        self._own = [name for name in CONTENTS if not (self.folder / name).exists()]
        parents = () if is_bucket(folder) else (self.folder, *self.folder.parents)
        self._made = [path for path in parents if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder)
        except UserError:
            raise
        except Exception as error:
            if not is_of_storage(error) and not isinstance(error, ValueError):  # TensorStore's
                raise
            if is_bucket(folder):
                raise unreachable(folder, error) from error
            why = getattr(error, "strerror", error)
            raise UserError(
                f"cannot write to the workdir {folder} ({why}); choose another --workdir"
            ) from None
        if not is_begun(self.folder) and (self.folder / "environment.json").exists():
            # Left by a process that was killed before the first update.
            (self.folder / "config.json").unlink(missing_ok=True)
            self._own = list(CONTENTS)
        check_config(self.folder, config)
        final = read_final(self.folder)
        if final is not None and final.get("status") == "finished":
            self._check_finished()
            return final
        write_json(self.folder / "config.json", json.loads(config.to_json()))
        seconds = {"seconds": recorded_seconds(self.folder)}
        write_json(self.folder / "environment.json", environment() | seconds)
        return None

    def _check_finished(self) -> None:
        missing = [] if (self.folder / "config.json").exists() else ["config.json is"]
        missing += [] if saved_steps(self.folder) else ["its checkpoints are"]
        if missing:
            raise UserError(
                f"{self.folder}/final.json says that the run has finished, but "
                f"{' and '.join(missing)} missing; restore them, or choose another --workdir"
            )

    def abandon(self) -> None:
        """Removes all that was written of a run that ends before its first updates."""
        if not processes.is_first():
            return
        try:
            if is_begun(self.folder):
                return
            for name in self._own:
                if name == LOCK and is_bucket(self.folder):
                    continue  # `release` deletes it
                path = self.folder / name
                path.rmtree() if path.is_dir() else path.unlink(missing_ok=True)
            for path in self._made:
                path.rmdir()
        except Exception as error:
            if not is_of_storage(error):
                raise
            # The folder holds something of the user's, or can no longer be reached.

    def release(self) -> None:
        """Lets another run use the workdir."""
        if processes.is_first():
            self._lock.release()


def is_begun(folder: epath.Path) -> bool:
    """Whether a run in the folder has made updates, and left something to keep."""
    lines = folder / "metrics.jsonl"
    has_lines = lines.exists() and lines.stat().length > 0
    has_more = any((folder / name).exists() for name in ("final.json", "damaged"))
    return has_lines or has_more or bool(saved_steps(folder))


def check_config(
    folder: AnyPath,
    config: ConfigDict,
    free: tuple[str, ...] = TOPOLOGY,
    advice: str = "choose another --workdir or the old settings",
) -> None:
    """Checks that the run in a folder, if there is one, has this config.

    Args:
      folder: a workdir.
      config: what `continued` would change in it is not compared.
      free: prefixes of the fields that may differ.
      advice: what the user should do.

    Raises:
      UserError: the run has another config, or its config.json is broken.
    """
    if not (epath.Path(folder) / "config.json").exists():
        return
    found = read_config(folder)
    both = (found, _continued(found, config))
    old, new = (json.loads(one.to_json()) for one in both)
    changes = [change for change in differences(old, new) if not change.startswith(free)]
    if changes:
        raise UserError(f"{folder} holds a run of another config ({'; '.join(changes)}); {advice}")


def read_config(folder: AnyPath) -> ConfigDict:
    """The config of the run in a folder, with every field of `base_config`.

    A field that is newer than the run has its value in LEGACY or else its default.

    Raises:
      UserError: there is no config.json, or it is broken.
    """
    path = folder_of(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run: there is no config.json in it; train there first")
    config = ConfigDict(json.loads(base_config().to_json()))
    config.update_from_flattened_dict(LEGACY)
    with config.ignore_type():
        config.update(read_json(path))
    return _completed(config)


def _completed(config: ConfigDict) -> ConfigDict:
    """A copy with the younger fields of its model, and with today's name of its residual rule."""
    config = config.copy_and_resolve_references()
    model = config.get("model", {})
    with config.unlocked():
        if config.get("version") == 1 and model.get("residual") == "layerscale":
            model.residual = "rezero_channel"
        if model.get("name") in ("mlp", "transformer", "vit"):
            for name in YOUNGER.keys() - model.keys():
                model[name] = YOUNGER[name]
    return config


def continued(folder: AnyPath, config: ConfigDict) -> ConfigDict:
    """`config` as the run in `folder`, if there is one, continues with it.

    A field in LEGACY that is missing or has its default takes the value with which the run began,
    and so does one in OPEN with the value there.

    Raises:
      UserError: the run's config.json is broken.
    """
    if not (folder_of(folder) / "config.json").exists():
        return _completed(config)
    return _continued(read_config(folder), config)


def _continued(found: ConfigDict, config: ConfigDict) -> ConfigDict:
    old, defaults = flatten(found.to_dict()), flatten(base_config().to_dict())
    now = flatten(config.to_dict())
    kept = {key: old[key] for key in LEGACY if now.get(key, defaults[key]) == defaults[key]}
    unset = (key for key, value in OPEN.items() if key in now and now[key] == value)
    kept |= {key: old[key] for key in unset if key in old}
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(kept)
    return _completed(config)


def recorded_seconds(folder: epath.Path) -> float:
    """Wall time of the processes of a run so far, as far as their last start and lines tell."""
    found = [0.0]
    if (folder / "environment.json").exists():
        found.append(read_json(folder / "environment.json").get("seconds", 0.0))
    if (folder / "metrics.jsonl").exists():
        found += [line.get("seconds", 0.0) for line in read_metrics(folder)]
    return max(found)


def saved_steps(folder: AnyPath) -> list[int]:
    """The steps of a run's finished checkpoints, ascending."""
    checkpoints = epath.Path(folder) / "checkpoints"
    if is_bucket(checkpoints):  # Orbax writes this object last
        whole = [path.parent for path in checkpoints.glob("*/commit_success.txt")]
    else:  # Orbax writes under another name and renames, so a whole number is a whole checkpoint
        whole = list(checkpoints.glob("*"))
    return sorted(int(path.name) for path in whole if path.name.isdigit())


def read_final(folder: AnyPath) -> dict[str, Any] | None:
    """final.json of a run that finished or diverged, or None.

    Raises:
      UserError: it is broken.
    """
    path = epath.Path(folder) / "final.json"
    return read_json(path) if path.exists() else None


def environment() -> dict[str, Any]:
    """Versions, device and commit, as far as they can be known."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "machine": f"{devices.processor()}, {os.cpu_count()} cores",
        "commit": commit or None,
    }


def device(environment: dict[str, Any]) -> str:
    """The hardware in an `environment`, in a few words."""
    if environment["device"] == "cpu":
        return str(environment["machine"])
    return f"{environment['devices']} x {environment['device']}"
