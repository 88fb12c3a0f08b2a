"""Compares runs and checkpoints for the threads of the campaign."""

import json
import tempfile
import threading
from typing import Any

from etils import epath

from rezero_jax.config import load_config
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.files import copy_folder
from rezero_jax.training.trainer import Trainer
from tests.faults import compare
from tests.faults.runs import ROOT, Family, Reference


class Judge:
    """Compares to the bit; for several threads, of which one at a time may use Orbax."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._programs: dict[str, Trainer] = {}

    def differences(self, one: epath.Path, other: epath.Path) -> list[str]:
        """What two finished runs do not share; see `compare.differences`."""
        with self._lock:
            return compare.differences(one, other)

    def is_as_saved(self, reference: Reference, checkpoint: epath.Path) -> bool:
        """Whether a checkpoint is restored to what the reference saved at its step."""
        sound = reference.workdir / "checkpoints" / checkpoint.name
        with self._lock:
            a, b = (self._restored(reference.family, folder) for folder in (checkpoint, sound))
        if a is None or b is None:
            return False
        changed = compare.changed_arrays(compare.by_path(a[0]), compare.by_path(b[0]))
        return not changed and json.dumps(a[1]) == json.dumps(b[1])

    def _restored(
        self, family: Family, checkpoint: epath.Path
    ) -> tuple[Any, dict[str, Any]] | None:
        """State and progress, as train.py would restore them; of a copy, which it may move."""
        config = load_config(str(ROOT / family.config), [*family.settings, "mesh.data=1"])
        if family.name not in self._programs:
            self._programs[family.name] = Trainer.from_config(config)
        with tempfile.TemporaryDirectory() as folder:
            copy = epath.Path(folder) / "checkpoints"
            copy_folder(checkpoint, copy / checkpoint.name)
            checkpoints = Checkpoints(copy, config.checkpoint)
            try:
                return checkpoints.restore(self._programs[family.name].shapes, lambda _: None)
            finally:
                checkpoints.close()
