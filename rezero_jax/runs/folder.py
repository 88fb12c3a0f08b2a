"""The workdir is the record of a run; everything that plots or compares reads these files.

config.json        the config, resolved
environment.json   versions, device and commit of the last start
metrics.jsonl      one line per logged step, flushed
tensorboard/       the same numbers as TensorBoard events
checkpoints/       see rezero_jax.runs.checkpoint
final.json         last and best metrics, steps, seconds, examples/s, parameters, status
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import weakref
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rezero_jax import processes
from rezero_jax.config import base_config, differences, flatten
from rezero_jax.errors import UserError

# Where and on how much hardware a run happens may change between two starts; what it computes not.
TOPOLOGY = ("mesh.", "data.dir", "data.stream")
# What an evaluation of a finished run may ask for otherwise than the run did.
EVALUATION = ("eval.", "data.context", "data.eval_split")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
    """The folder of one run, held by this run alone until it ends.

    Of several processes the first one holds and writes it; the others must see it too.

    Attributes:
      folder: its absolute path.
      final: final.json of a finished run, or None.

    Args:
      folder: made if need be.
      config: of the run.
      evaluating: the process only evaluates: the config may ask for another evaluation than the
        run did, and the folder's files stay as they are.

    Raises:
      UserError: the folder cannot be written, belongs to another config, is in use, or is not on
        storage that all processes share; in every process alike.
    """

    def __init__(self, folder: str | Path, config: ConfigDict, evaluating: bool = False):
        if "://" in str(folder):
            raise UserError(
                f"--workdir={folder} is no folder; mount the storage and name the folder there"
            )
        self.folder = Path(folder).absolute()
        self.final = processes.from_first(
            lambda: self._claim(folder, json.loads(config.to_json()), evaluating)
        )
        if not processes.all_agree((self.folder / "config.json").exists()):
            raise UserError(
                f"not every process finds the workdir {folder}; choose a --workdir on storage that "
                "all hosts share"
            )

    def _claim(
        self, folder: str | Path, resolved: dict[str, Any], evaluating: bool
    ) -> dict[str, Any] | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
            weakref.finalize(self, self._lock.close)
        except OSError as error:
            raise UserError(
                f"cannot write to the workdir {folder} ({error.strerror}); choose another --workdir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {folder}; wait or stop it") from None
        check_config(self.folder, resolved, TOPOLOGY + EVALUATION if evaluating else TOPOLOGY)
        if not evaluating:
            write_json(self.folder / "config.json", resolved)
            write_json(self.folder / "environment.json", environment())
        final = read_final(self.folder)
        return final if final is not None and final["status"] == "finished" else None


def check_config(
    folder: Path,
    resolved: dict[str, Any],
    free: tuple[str, ...] = TOPOLOGY,
    mend: str = "choose another --workdir or the old settings",
) -> None:
    """Checks that the run in a folder, if there is one, is that of a config.

    A field that its config does not have, because it was begun before there was such a field, had
    the default.

    Args:
      folder: a workdir.
      resolved: a config as nested dicts of JSON's types.
      free: prefixes of the fields that may differ.
      mend: what the error advises.

    Raises:
      UserError: it is the run of another config.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    defaults = flatten(json.loads(base_config().to_json()))
    old = defaults | flatten(json.loads(path.read_text()))
    changes = [
        change for change in differences(old, flatten(resolved)) if not change.startswith(free)
    ]
    if changes:
        raise UserError(f"{folder} holds a run of another config ({'; '.join(changes)}); {mend}")


def saved_steps(folder: str | Path) -> list[int]:
    """The steps of a run's finished checkpoints, ascending.

    Orbax writes under another name and renames, so a whole number is a whole checkpoint.
    """
    folders = (Path(folder) / "checkpoints").glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdigit())


def read_final(folder: str | Path) -> dict[str, Any] | None:
    """final.json of a run that finished or diverged, or None."""
    path = Path(folder) / "final.json"
    return json.loads(path.read_text()) if path.exists() else None


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
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit or None,
    }


def device(environment: dict[str, Any]) -> str:
    """What an `environment` says that a run ran on, in a few words."""
    if environment["device"] == "cpu":
        return str(environment["machine"])
    return f"{environment['devices']} x {environment['device']}"


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is either the old one or the new one, never half of it."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader finds the old text or the new, whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
