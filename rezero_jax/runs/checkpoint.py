"""Checkpoints with Orbax: written in the background, never loaded when damaged.

Several processes write and read each their own part, in one folder that all of them share.

Checkpoint k is the state after k updates, with a small JSON record beside it: the loop's running
sums, a fingerprint of every array, and a checksum of both. A checkpoint that does not match them,
or that cannot be read at all, is moved to `damaged/` with a warning, and the one before it is used.
"""

import contextlib
import errno
import gc
import json
import logging
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from rezero_jax import processes
from rezero_jax.errors import first_line
from rezero_jax.training.state import path_text


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: absolute path of the folder, made when first saved to.
      config: config.checkpoint.
    """

    def __init__(self, folder: Path, config: ConfigDict):
        self._folder = folder
        kept: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every_steps is not None:
            kept.append(policies.EveryNSteps(config.keep_every_steps))
        if config.keep_best:
            kept.append(_Best(folder, config.keep_best))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            # Made in the background, a folder that cannot be made would leave threads waiting.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        # Each process reads for itself, as one that finds damage must not leave others waiting.
        own = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=own)
            ),
            multiprocessing_options=own,
        )
        # Orbax logs a traceback of what it then raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._manager = self._open()
        self._bit_sums = jax.jit(_bit_sums)

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=self._options)

    def save(
        self, step: int, state: Any, progress: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Saves in the background.

        Args:
          step: number of updates applied.
          state: the training state.
          progress: plain JSON data, given back by `restore`.
          metrics: the evaluation after this very step, if there was one.

        Raises:
          OSError: there is no room for it, or it or the one before it cannot be written.
        """
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        record: dict[str, Any] = {
            "progress": progress,
            "evaluation": metrics,
            "fingerprint": self._fingerprint(state),
        }
        record["checksum"] = _checksum(record)
        with _failed_writes_told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
                ),
                metrics=metrics,
            )

    def _check_room(self, needed: int) -> None:
        """Finds a full disk beforehand: found while writing, TensorStore prints tracebacks."""
        folder = self._folder if self._folder.exists() else self._folder.parent
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free",
            )

    def restore(
        self, shapes: Any, warn: Callable[[str], None]
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest good state and its progress, or None if there is none.

        Args:
          shapes: the state's shapes, dtypes and shardings, which may be others than when saved.
          warn: told of each damaged checkpoint.
        """
        steps = processes.from_first(lambda: sorted(self._manager.all_steps(), reverse=True))
        for step in steps:
            reason = "another process cannot read it"
            read = None
            with _failed_reads_dropped():
                try:
                    read = self._read(step, shapes)
                except Exception as error:  # Orbax raises whatever its storage layers raise.
                    reason = first_line(error)
                if processes.all_agree(read is not None) and read is not None:
                    state, progress, fingerprint = read
                    if self._fingerprint(state) == fingerprint:
                        return state, progress
                    reason = "its arrays are not those that were saved"
                target = self._set_aside(step)
            warn(
                f"checkpoint {step} is damaged ({reason}); moved it to {target} "
                "and going back to the one before it"
            )
        if steps:
            warn(f"no good checkpoint is left in {self._folder}; a run starts anew")
        return None

    def _read(self, step: int, shapes: Any) -> tuple[Any, dict[str, Any], dict[str, int]]:
        """State, progress and fingerprint as they are in the files."""
        restored = self._reader.restore(
            self._folder / str(step),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), record=ocp.args.JsonRestore()
            ),
        )
        record = _verified(restored.record)
        return restored.state, record["progress"], record["fingerprint"]

    def _fingerprint(self, state: Any) -> dict[str, int]:
        return {name: int(value) for name, value in self._bit_sums(state).items()}

    def _set_aside(self, step: int) -> Path:
        self._manager.close()
        target = self._folder.parent / "damaged" / str(step)

        def move() -> None:
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(self._folder / str(step), target)

        processes.from_first(move)
        self._manager = self._open()
        return target

    def finish(self) -> None:
        """Returns when every save is on disk, and no checkpoint but those to be kept.

        Each save deletes what it replaces, but only once it is written: a process killed in
        between leaves one too many.

        Raises:
          OSError: the last one cannot be written.
        """
        self.wait()
        for step in processes.from_first(self._left_over):
            self._manager.delete(step)

    def _left_over(self) -> list[int]:
        found = [_Info(step) for step in sorted(self._manager.all_steps())]
        policy = self._options.preservation_policy
        kept = policy.should_preserve(found, context=policies.PreservationContext())
        return [info.step for info, is_kept in zip(found, kept, strict=True) if not is_kept]

    def wait(self) -> None:
        """Returns when every save is on disk.

        Raises:
          OSError: the last one cannot be written.
        """
        with _failed_writes_told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases the manager's threads.

        Raises:
          OSError: the last save cannot be written.
        """
        with _failed_writes_told():
            self._manager.close()
            self._reader.close()


@dataclass
class _Info:
    """What a policy is told of a checkpoint."""

    step: int
    metrics: dict[str, Any] | None = None  # in the record
    time: datetime = datetime.min


class _Best(policies.PreservationPolicy):
    """Keeps the `count` checkpoints of lowest eval/loss.

    Orbax's BestN knows the evaluations of this process alone: after a restart it would delete what
    was best before.
    """

    def __init__(self, folder: Path, count: int):
        self._folder, self._count = folder, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = {
            info.step: evaluation["eval/loss"]
            for info in checkpoints
            if (evaluation := info.metrics or self._recorded(info.step))
        }
        best = sorted(losses, key=losses.__getitem__)[: self._count]
        return [info.step in best for info in checkpoints]

    def _recorded(self, step: int) -> dict[str, float] | None:
        try:
            record = json.loads((self._folder / str(step) / "record" / "metadata").read_text())
            return _verified(record)["evaluation"]
        except (OSError, ValueError, KeyError, AttributeError):  # damaged, or of an earlier version
            return None


@contextlib.contextmanager
def _failed_writes_told() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises whatever its storage layers raise.
        # Its other threads stumble over the same failure, each with a traceback of its own.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        threading.excepthook = lambda _: None
        raise OSError(first_line(error)) from error


@contextlib.contextmanager
def _failed_reads_dropped() -> Iterator[None]:
    """Keeps the other failed reads of a damaged checkpoint quiet.

    When one read fails, Orbax drops the rest unseen, and Python would print a traceback of each
    when it is collected; the warning says all there is to say.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _verified(record: dict[str, Any]) -> dict[str, Any]:
    """The record without its checksum, which those of earlier versions lack."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    if record.get("checksum") not in (None, _checksum(rest)):
        raise ValueError("its record is not the one that was saved")
    return rest


def _bit_sums(state: Any) -> dict[str, Array]:
    """For each array, the sum of its bits as integers modulo 2**32: any flipped bit changes it."""
    return {
        path_text(path): jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").sum(
            dtype=jnp.uint32
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }
