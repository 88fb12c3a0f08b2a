"""Checkpoints of a run that trains, with Orbax: written in the background, and few of them kept.

Checkpoint k is the state after k updates, with the manifest that rezero_jax.runs.restore verifies.
Each process writes its own shards, in one folder that all processes share.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from rezero_jax import processes
from rezero_jax.errors import UserError, first_line
from rezero_jax.runs.files import AnyPath, is_bucket, is_outage, path_of, writing
from rezero_jax.runs.moving import move_folder
from rezero_jax.runs.restore import checksum, fingerprint, read_manifest, read_newest

SMALL_FILES = 2**18  # bytes of a checkpoint on a disk, besides its arrays


class Checkpoints:
    """Checkpoints of one run; used as a context, which waits for the last save at its end.

    Each method raises a UserError if this checkpoint or the one before cannot be written. The first
    save makes `folder`, in a workdir. `check` is called before a save and before its commit, and
    raises a UserError if this start may no longer write.
    """

    def __init__(
        self, folder: AnyPath, config: ConfigDict, check: Callable[[], None] = lambda: None
    ):
        self._folder = folder = path_of(folder)
        self._check = check
        kept: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every_steps is not None:
            kept.append(policies.EveryNSteps(config.keep_every_steps))
        if config.keep_best:
            kept.append(_Best(folder, config.keep_best))
        modes = ocp.options.AtomicityMode  # AUTO would rename in buckets other than Google's.
        mode = modes.COMMIT_FILE if is_bucket(folder) else modes.ATOMIC_RENAME
        atomicity = ocp.options.AtomicityOptions(mode=mode)
        self._options = ocp.CheckpointManagerOptions(
            atomicity_options=atomicity,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            async_options=ocp.AsyncOptions(
                timeout_secs=2**33,  # of a clock that may jump by years
                # In the background, a folder that cannot be made would leave threads waiting.
                create_directories_asynchronously=False,
                # Orbax calls this after it has written all files, right before the commit.
                post_finalization_callback=check,
            ),
        )
        handlers = {
            # Compressing takes four times as long as writing, and saves 8 % of the size.
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "record": ocp.JsonCheckpointHandler(),
        }
        with _write_errors(folder):
            processes.on_first(lambda: _remove_unfinished(folder, atomicity))
            self._manager = ocp.CheckpointManager(
                folder, options=self._options, item_handlers=handlers
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        is_lost = jax.process_count() > 1 and isinstance(error, JaxRuntimeError)
        is_lost = is_lost or isinstance(error, processes.Lost) or is_outage(self._folder, error)
        if not is_lost:  # Otherwise a save would wait for the lost process or bucket.
            self.close()

    def save(
        self, step: int, state: Any, progress: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Saves the state after `step` updates in the background.

        `progress` is plain JSON data, which `restore` returns, and `metrics` the evaluation after
        this very step, if there was one.
        """
        needed = SMALL_FILES + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        manifest: dict[str, Any] = {
            "progress": progress,
            "evaluation": metrics,
            "fingerprint": fingerprint(state),
        }
        manifest["checksum"] = checksum(manifest)
        arrays, record = ocp.args.PyTreeSave(state), ocp.args.JsonSave(manifest)
        items = ocp.args.Composite(state=arrays, record=record)
        with _write_errors(self._folder):
            if not is_bucket(self._folder):
                # TensorStore would detect a full disk later, with tracebacks.
                free = shutil.disk_usage(self._folder.parent).free
                if free < needed:
                    both = f"{needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB"
                    raise OSError(f"a checkpoint needs {both} are free")
            processes.on_first(self._check)
            self._manager.save(step, args=items, metrics=metrics)

    def restore(
        self, shapes: Any, warn: Callable[[str], None] = processes.warn
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest good state and its progress, or None; moves damaged checkpoints away.

        Arguments and errors are those of `read_newest`.
        """
        found = read_newest(self._folder, shapes, warn, self._set_aside)
        if found is None and (self._folder.parent / "damaged").is_dir():
            warn(f"no good checkpoint is left in {self._folder}; the run starts anew")
        return found

    def _set_aside(self, step: int) -> epath.Path:
        target = self._folder.parent / "damaged" / str(step)
        with _write_errors(self._folder):
            processes.on_first(lambda: move_folder(self._folder / str(step), target))
            self._manager.reload()
        return target

    def finish(self) -> None:
        """Waits for the last save, and deletes the checkpoints that need not be kept.

        Each save deletes the checkpoints that it replaces once it is written, so a process killed
        in between leaves one too many.
        """
        with _write_errors(self._folder):
            self._manager.wait_until_finished()
            for step in processes.on_first(self._left_over):
                self._manager.delete(step)

    def _left_over(self) -> list[int]:
        # The policies do not use the time, and read the metrics from the manifest.
        found = [SimpleNamespace(step=s, metrics=None) for s in sorted(self._manager.all_steps())]
        policy = self._options.preservation_policy
        kept = policy.should_preserve(found, context=policies.PreservationContext())
        return [info.step for info, is_kept in zip(found, kept, strict=True) if not is_kept]

    def close(self) -> None:
        """Waits for the last save, and ends the threads of Orbax."""
        with _write_errors(self._folder):
            self._manager.close()


def _remove_unfinished(folder: epath.Path, options: ocp.options.AtomicityOptions) -> None:
    """Deletes the checkpoints of starts that were killed while they saved.

    Orbax would do so in the background, and in a bucket it would delete the successor of a
    checkpoint that is being moved away.
    """
    for path in ocp.path.step.all_temporary_paths(folder, atomicity_options=options):
        path.get().rmtree()


class _Best(policies.PreservationPolicy):
    """Keeps the `count` checkpoints of lowest eval/loss, also those of earlier starts.

    Orbax's BestN knows the evaluations of this process alone.
    """

    def __init__(self, folder: epath.Path, count: int):
        self._folder, self._count = folder, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = {
            info.step: evaluation["eval/loss"]
            for info in checkpoints
            if (evaluation := info.metrics or self._saved(info.step))
        }
        best = sorted(losses, key=losses.__getitem__)[: self._count]
        return [info.step in best for info in checkpoints]

    def _saved(self, step: int) -> dict[str, float] | None:
        try:
            return read_manifest(self._folder / str(step))["evaluation"]
        except (OSError, ValueError):  # damaged
            return None


@contextlib.contextmanager
def _write_errors(folder: epath.Path) -> Iterator[None]:
    """`writing` for errors of Orbax: TensorStore raises ValueErrors, and threads RuntimeErrors."""
    with writing(folder.parent):
        try:
            yield
        except (UserError, JaxRuntimeError):  # `check` failed; another process is lost, or memory
            raise
        except (ValueError, RuntimeError) as error:
            raise OSError(first_line(error)) from error
