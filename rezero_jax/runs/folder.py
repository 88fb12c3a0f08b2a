"""The records in the folder of a run: read, checked and compared."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rezero_jax import devices
from rezero_jax.config import LENGTHS, differences, flatten
from rezero_jax.errors import UserError, foreign
from rezero_jax.runs.files import AnyPath, broken, folder_of, is_bucket, path_of, read_json

# Prefixes of fields that may change between two starts: where and on how much hardware a run is.
# `check_data` notices other data in another place.
TOPOLOGY = ("mesh.", "data.dir", "data.path", "data.stream", "data.workers")
# Prefixes of fields that an evaluation may set to other values than the run.
EVALUATION = ("eval.", "data.context", "data.eval_split")
# Fields in which a longer run differs from the run that it lengthens, as `differences` begins them.
LENGTH_FIELDS = tuple(f"train.{field}:" for field in LENGTHS["train"])
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check_config(
    folder: AnyPath,
    config: ConfigDict,
    free: tuple[str, ...] = TOPOLOGY,
    advice: str = "choose another --workdir or the old settings",
) -> None:
    """Checks that the run in a folder, if there is one, has this config, see `continued`.

    `free` has prefixes of the fields that may differ, and `advice` is what the user should do.
    Raises a UserError if the run has another config, or its config.json is broken.
    """
    path = path_of(folder) / "config.json"
    if not path.exists():
        return
    old, new = read_json(path), json.loads(continued(folder, config).to_json())
    changes = [change for change in differences(old, new) if not change.startswith(free)]
    if changes:
        raise UserError(f"{folder} holds a run of another config ({'; '.join(changes)}); {advice}")


def check_data(folder: AnyPath, data: Mapping[str, Any]) -> None:
    """Checks that the run in a folder, if there is one, was trained on the same data.

    What only one of the two records has (see `Dataset.record`), such as the hash of pixels that are
    streamed, is not compared. Raises a UserError if the data are others, or dataset.json is broken.
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
    path = folder_of(folder) / "dataset.json"
    return read_json(path) if path.exists() else {}


def check_passed(folder: AnyPath, passed: bool) -> None:
    """Raises a UserError if the run needs a data set that its config does not name.

    `passed` is whether the caller passes a data set, as the caller of `train` did.
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
        with config.unlocked(), foreign(folder_of(folder) / "config.json"):
            config.model.dtype = recorded_config(folder).model.dtype
    return config


def saved_steps(folder: AnyPath) -> list[int]:
    """Steps of a run's finished checkpoints, ascending."""
    checkpoints = path_of(folder) / "checkpoints"
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    if is_bucket(checkpoints):  # On a disk, Orbax renames a finished checkpoint to its number.
        found = [path for path in found if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in found)


def read_final(folder: AnyPath) -> dict[str, Any]:
    """final.json of a run that finished or diverged; empty while the run has not ended."""
    path = path_of(folder) / "final.json"
    if not path.exists():
        return {}
    content = read_json(path)
    numbers = dict.fromkeys(content, (int, float)) | {"steps": int, "seconds": (int, float)}
    return _checked(path, content, numbers | {"status": str})


def read_environment(folder: AnyPath) -> dict[str, Any]:
    """environment.json of a run's last start; raises a UserError if it is missing or broken."""
    path = path_of(folder) / "environment.json"
    kinds = {"device": str, "machine": str, "devices": int, "seconds": (int, float)}
    return _checked(path, read_json(path), kinds)


def _checked(path: AnyPath, content: dict[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """`content` if each field has its kind; else raises a UserError."""
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise broken(path, f"its {name} is {content.get(name, 'missing')}")
    return content


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
