"""The one reader of checkpoints, for training and for whatever else loads a model: it verifies.

A checkpoint has a small JSON manifest beside its arrays (the item "record"), with a fingerprint of
every array and a checksum of the manifest. One that does not match them is damaged. Only training
moves damaged checkpoints away; all else warns and leaves them. A sound checkpoint of another model
is refused and stays.
"""

import contextlib
import gc
import json
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import Array
from jax.sharding import SingleDeviceSharding

from rezero_jax import processes
from rezero_jax.errors import Unavailable, UserError, first_line
from rezero_jax.runs.files import is_outage
from rezero_jax.runs.folder import saved_steps


class Damaged(Exception):
    """A checkpoint is not what was saved, or is unreadable; the text says why."""


def read(folder: epath.Path, step: int, shapes: Any) -> tuple[Any, dict[str, Any]]:
    """The verified state and manifest of a checkpoint; nothing is written.

    Args:
      folder: the checkpoints of a run.
      step: which one.
      shapes: the state's shapes, dtypes and shardings; the shardings may differ from those saved.

    Raises:
      Damaged: its checksum or fingerprint does not match, or it cannot be read.
      UserError: it is sound, but the state of a model of another structure.
      Unavailable: the bucket does not answer, to this process or another one.
    """
    loaded, answers = None, True
    refusal: Exception = Damaged("another process cannot read it")
    with _failed_reads_dropped():
        try:
            loaded = _load(folder / str(step), shapes)
        except UserError as error:
            refusal = error
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            answers, refusal = not is_outage(folder, error), Damaged(first_line(error))
        if not processes.agree(loaded is not None) or loaded is None:
            if not processes.agree(answers):
                raise Unavailable(
                    f"cannot read checkpoint {step} in {folder}, as the bucket does not answer "
                    f"({refusal}); the same command resumes from it later"
                )
            raise refusal
        state, manifest = loaded
        if fingerprint(state) != manifest["fingerprint"]:
            raise Damaged("its arrays are not those that were saved")
    return state, manifest


def read_newest(
    folder: epath.Path,
    shapes: Any,
    warn: Callable[[str], None] = processes.warn,
    set_aside: Callable[[int], epath.Path] | None = None,
) -> tuple[Any, dict[str, Any]] | None:
    """The state and manifest of the newest good checkpoint, or None if there is none.

    Args:
      folder: the checkpoints of a run.
      shapes: see `read`.
      warn: receives a sentence on each damaged checkpoint.
      set_aside: moves a damaged checkpoint away and returns its new place; None leaves it.

    Raises:
      UserError: see `read`.
    """
    for step in processes.on_first(lambda: saved_steps(folder.parent)[::-1]):
        try:
            return read(folder, step, shapes)
        except Damaged as error:
            if set_aside is not None:
                done = f"moved it to {set_aside(step)} and going back to the one before it"
            elif (folder / str(step)).is_dir():
                done = "using the one before it"
            else:  # deleted by a run that is still training
                continue
            warn(f"checkpoint {step} is damaged ({error}); {done}")
    return None


def _load(folder: epath.Path, shapes: Any) -> tuple[Any, dict[str, Any]]:
    """State and manifest as they are in the files, if those are of the model that is wanted."""
    manifest = read_manifest(folder)
    # Each process reads for itself, as one that finds damage must not leave others waiting.
    own = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=own)
    with ocp.Checkpointer(handler, multiprocessing_options=own) as reader:

        def restore(shapes: Any) -> Any:
            return reader.restore(folder / "state", args=ocp.args.StandardRestore(shapes))

        saved = reader.metadata(folder / "state").item_metadata.tree
        differing = _differing(saved, shapes)
        if not differing:
            return restore(shapes), manifest
        # Damage can look like another structure, unless the arrays are as they were saved.
        here = SingleDeviceSharding(jax.local_devices()[0])
        own_shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved
        )
        if fingerprint(restore(own_shapes)) != manifest["fingerprint"]:
            raise ValueError("its arrays are not those that were saved")
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise UserError(
        f"checkpoint {folder.name} in {folder.parent.parent} is of a model of another structure "
        f"({'; '.join(differing[:3])}{more}); go back to the code and the settings that wrote it, "
        "or choose another --workdir"
    )


def _differing(saved: Any, wanted: Any) -> list[str]:
    """The arrays that differ in dtype or shape, the model's parameters first."""
    here, there = (
        {
            _path(path): f"{leaf.dtype}{tuple(leaf.shape)}"
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (wanted, saved)
    )
    return [
        f"{path}: {there.get(path, 'absent')} in the checkpoint, {here.get(path, 'absent')} here"
        for path in sorted(here.keys() | there, key=lambda p: (not p.startswith("params/"), p))
        if here.get(path) != there.get(path)
    ]


@contextlib.contextmanager
def _failed_reads_dropped() -> Iterator[None]:
    """Silences the further failed reads of a damaged checkpoint.

    Orbax drops them once one has failed, and Python would print the traceback of each as it is
    collected.
    """
    for name in ("asyncio", "absl"):  # Orbax logs a traceback of what it then raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # TensorStore's threads come to one or the other, and late ones come after this context.
    after = [
        hook if isinstance(hook, _WithoutLateReads) else _WithoutLateReads(hook)
        for hook in (sys.unraisablehook, sys.excepthook)
    ]
    sys.unraisablehook, sys.excepthook = lambda _: None, lambda *_: None
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook, sys.excepthook = after


class _WithoutLateReads:
    """sys.unraisablehook or sys.excepthook without the reads of TensorStore that end too late."""

    late = ("Event loop is closed", "Encountered error while reading array index")

    def __init__(self, hook: Callable[..., Any]):
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        error = args[0].exc_value if len(args) == 1 else args[1]
        if not str(error).startswith(self.late):
            self._hook(*args)


def checksum(manifest: dict[str, Any]) -> int:
    """The checksum of the rest of a manifest."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """A checkpoint's manifest, verified by its checksum, which those of earlier versions lack."""
    manifest = json.loads((folder / "record" / "metadata").read_text())
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    is_whole = {"progress", "fingerprint"} <= rest.keys()
    if not is_whole or manifest.get("checksum") not in (None, checksum(rest)):
        raise ValueError("its record is not the one that was saved")
    return rest


def fingerprint(state: Any) -> dict[str, int]:
    """For each array, the sum of its bits as integers modulo 2**32: any flipped bit changes it."""
    leaves = jax.tree.leaves_with_path(state)
    # Whole rows add up ten times as fast on a CPU as single numbers do; a group of rows lies on one
    # device, so that nothing travels but its sum.
    shapes = (leaf.sharding.shard_shape(leaf.shape) for _, leaf in leaves)
    rows = tuple(math.gcd(16, *shape[:1]) if shape else 1 for shape in shapes)
    sums = np.asarray(_bit_sums([leaf for _, leaf in leaves], rows))  # one transfer for all
    return {_path(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


@partial(jax.jit, static_argnums=1)
def _bit_sums(leaves: list[Array], rows: tuple[int, ...]) -> Array:
    """The sums, uint32 (leaves,), each made of those of so many rows."""

    def bit_sum(leaf: Array, rows: int) -> Array:
        uint = f"uint{8 * leaf.dtype.itemsize}"
        bits = jnp.atleast_1d(jax.lax.bitcast_convert_type(leaf, uint))
        grouped = bits.reshape(len(bits) // rows, rows, *bits.shape[1:])
        groups = grouped.sum(axis=1, dtype=jnp.uint32)
        return jax.lax.optimization_barrier(groups).sum(dtype=jnp.uint32)

    return jnp.stack([bit_sum(leaf, n) for leaf, n in zip(leaves, rows, strict=True)])


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
