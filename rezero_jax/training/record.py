"""The workdir is the record of a run; everything that plots or compares reads these files.

config.json        the config, resolved
environment.json   versions, device and commit of the last start
metrics.jsonl      one line per logged step, flushed
tensorboard/       the same numbers as TensorBoard events
checkpoints/       see rezero_jax.training.checkpoint
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
from typing import Any, TextIO

import jax
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from rezero_jax import hosts
from rezero_jax.config import base_config, differences, flatten
from rezero_jax.errors import UserError

# Where and on how much hardware a run happens may change between two starts; what it computes not.
TOPOLOGY = ("mesh.", "data.dir", "data.stream")
# What an evaluation of a finished run may ask for otherwise than the run did.
EVALUATION = ("eval.", "data.context", "data.eval_split")
# TensorBoard's file is written in blocks, so that a kill loses the last lines of it: how many lines
# a run that goes on writes there again.
AGAIN = 200
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
        self.final = hosts.from_first(
            lambda: self._claim(folder, json.loads(config.to_json()), evaluating)
        )
        if not hosts.all_agree((self.folder / "config.json").exists()):
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


class Record:
    """Writes metrics.jsonl and the TensorBoard events.

    Args:
      folder: the workdir.
      step: updates applied so far; what an interrupted run recorded beyond it is dropped, since
        those steps are made again.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / "metrics.jsonl"
        again: list[dict[str, float]] = []
        if path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= step]
            _replace(path, "".join(json.dumps(line) + "\n" for line in kept))
            again = kept[-AGAIN:]
        self._lines: TextIO = path.open("a")
        first = int(again[0]["step"]) if again else step + 1
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        for line in again:
            self._show(int(line["step"]), {k: v for k, v in line.items() if k != "step"})

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line: `metrics` after `step` updates."""
        self._lines.write(json.dumps({"step": step} | metrics) + "\n")
        self._lines.flush()
        self._show(step, metrics)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        self._events.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a crash is left out.

    Raises:
      UserError: there is no such file.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{folder} holds no run: there is no {path.name} in it")
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
