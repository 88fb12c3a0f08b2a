"""Reads and verifies checkpoints, for training and for everything else that loads a model.

A checkpoint has a small JSON manifest beside its arrays (the item "record"), with the running sums
of the loop, a fingerprint of each array and a checksum of the manifest. A checkpoint that does not
match them is damaged. Training moves damaged checkpoints away; other readers warn and leave them.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
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
from rezero_jax.errors import UserError, first_line
from rezero_jax.formatting import path_text
from rezero_jax.runs.files import is_bucket, is_outage, open_file, read_text, storage_error
from rezero_jax.runs.folder import saved_steps


class Damaged(Exception):
    """A checkpoint is not what was saved, or is unreadable; the text says why."""


def read(folder: epath.Path, step: int, shapes: Any) -> tuple[Any, dict[str, Any]]:
    """The verified state of a checkpoint, and the running sums of the loop; nothing is written.

    Args:
      folder: the checkpoints of a run.
      shapes: the state's shapes, dtypes and shardings; the shardings may differ from those saved.
        None reads the arrays as they were saved to one device.

    Raises:
      Damaged: the checksum or a fingerprint does not match, or the checkpoint cannot be read.
      UserError: the checkpoint is sound, but of a model of another structure.
      Unavailable: the bucket does not answer this process or another one.
    """
    loaded, answers = None, True
    refusal: Exception = Damaged("another process cannot read it")
    try:
        loaded = _load(folder / str(step), shapes)
    except UserError as error:
        refusal = error
    except Exception as error:  # Orbax raises whatever its storage layers raise.
        answers, refusal = not is_outage(folder, error), Damaged(first_line(error))
    if not processes.agree(loaded is not None) or loaded is None:
        if not processes.agree(answers):
            raise storage_error(folder, TimeoutError(f"checkpoint {step}: {refusal}"))
        raise refusal
    state, manifest = loaded
    if fingerprint(state) != manifest["fingerprint"]:
        raise Damaged("its arrays are not those that were saved")
    return state, manifest["progress"]


def read_newest(
    folder: epath.Path,
    shapes: Any,
    warn: Callable[[str], None] = processes.warn,
    set_aside: Callable[[int], epath.Path] | None = None,
) -> tuple[Any, dict[str, Any]] | None:
    """`read` of the newest good checkpoint, or None if there is none.

    Calls `warn` with a sentence on each damaged checkpoint. `set_aside` moves one away and returns
    its new path; None leaves it.
    """
    tried: dict[int, Damaged] = {}
    found = None
    # A run that trains deletes checkpoints while they are read, and then has newer ones.
    while found is None and (steps := _saved_but(folder, tried)):
        for step in steps[::-1]:
            try:
                found = read(folder, step, shapes)
                break
            except Damaged as error:
                tried[step] = error
                if set_aside is not None:
                    done = f"moved it to {set_aside(step)} and going back to the one before it"
                    warn(f"checkpoint {step} is damaged ({error}); {done}")
    for step, why in tried.items():
        if set_aside is None and (folder / str(step)).is_dir():
            warn(f"checkpoint {step} is damaged ({why}); using the one before it")
    return found


def _saved_but(folder: epath.Path, tried: Iterable[int]) -> list[int]:
    steps = processes.on_first(lambda: saved_steps(folder.parent))
    return [step for step in steps if step not in tried]


def _load(folder: epath.Path, shapes: Any) -> tuple[Any, dict[str, Any]]:
    """State and manifest as they are in the files; raises whatever Orbax raises, or a UserError."""
    _check_files(folder)
    manifest = read_manifest(folder)
    # Each process reads for itself, as one that finds damage must not leave others waiting.
    own = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    with contextlib.closing(ocp.StandardCheckpointHandler(multiprocessing_options=own)) as handler:

        def restore(shapes: Any) -> Any:
            return handler.restore(folder / "state", args=ocp.args.StandardRestore(shapes))

        saved = handler.metadata(folder / "state").tree
        differing = [] if shapes is None else _differing(saved, shapes)
        if shapes is not None and not differing:
            return restore(shapes), manifest
        here = SingleDeviceSharding(jax.local_devices()[0])
        own_shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved
        )
        as_saved = restore(own_shapes)
        if shapes is None:
            return as_saved, manifest
        # Damage can look like another structure, unless the arrays are as they were saved.
        if fingerprint(as_saved) != manifest["fingerprint"]:
            raise ValueError("its arrays are not those that were saved")
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise UserError(
        f"checkpoint {folder.name} in {folder.parent.parent} is of a model of another structure "
        f"({'; '.join(differing[:3])}{more}); go back to the code and the settings that wrote it, "
        "or choose another --workdir"
    )


def _check_files(folder: epath.Path) -> None:
    """Raises an OSError for a pipe or a device, which TensorStore would wait for."""
    for parent, _, names in () if is_bucket(folder) else os.walk(folder):
        for name in names:
            os.close(open_file(os.path.join(parent, name)))


def _differing(saved: Any, wanted: Any) -> list[str]:
    here, there = (
        {
            path_text(path): f"{leaf.dtype}{tuple(leaf.shape)}"
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (wanted, saved)
    )
    return [
        f"{path}: {there.get(path, 'absent')} in the checkpoint, {here.get(path, 'absent')} here"
        for path in sorted(here.keys() | there, key=lambda p: (not p.startswith("params/"), p))
        if here.get(path) != there.get(path)
    ]


def checksum(manifest: dict[str, Any]) -> int:
    """The checksum of a manifest without its checksum."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """A checkpoint's manifest; raises an OSError or ValueError if it is not what was saved."""
    manifest = json.loads(read_text(folder / "record" / "metadata"))
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != checksum(manifest):
        raise ValueError("its record is not the one that was saved")
    if manifest.keys() != {"progress", "evaluation", "fingerprint"}:
        raise ValueError("its record has other fields than those of a run")
    return manifest


def fingerprint(state: Any) -> dict[str, int]:
    """For each array, the sum of its elements' bits modulo 2**32: any flipped bit changes it."""
    leaves = jax.tree.leaves_with_path(state)
    # A CPU adds whole rows ten times as fast as single numbers. A group of rows is on one device,
    # so that only its sum is sent to others.
    shapes = (leaf.sharding.shard_shape(leaf.shape) for _, leaf in leaves)
    rows = tuple(math.gcd(16, *shape[:1]) if shape else 1 for shape in shapes)
    sums = np.asarray(_bit_sums([leaf for _, leaf in leaves], rows))  # one transfer for all
    return {path_text(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


@partial(jax.jit, static_argnums=1)
def _bit_sums(leaves: list[Array], rows: tuple[int, ...]) -> Array:
    """Sums of the bits, uint32 (leaves,); adds `rows` rows of a leaf at a time."""

    def bit_sum(leaf: Array, rows: int) -> Array:
        uint = f"uint{8 * leaf.dtype.itemsize}"
        bits = jnp.atleast_1d(jax.lax.bitcast_convert_type(leaf, uint))
        grouped = bits.reshape(len(bits) // rows, rows, *bits.shape[1:])
        groups = grouped.sum(axis=1, dtype=jnp.uint32)
        return jax.lax.optimization_barrier(groups).sum(dtype=jnp.uint32)

    return jnp.stack([bit_sum(leaf, n) for leaf, n in zip(leaves, rows, strict=True)])
