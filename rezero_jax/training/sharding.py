"""The device mesh and what each device holds: one code path from one CPU device to many hosts."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rezero_jax.errors import UserError
from rezero_jax.processes import warn
from rezero_jax.stack import batch_axes
from rezero_jax.training.arrange import arrange
from rezero_jax.training.state import ModelSpec, path_text

# Smaller arrays stay whole under full sharding: fetching them costs more than keeping them.
FULLY_SHARDED_FROM = 1024  # elements


def make_mesh(config: ConfigDict, available: Sequence[jax.Device], batch: dict[str, int]) -> Mesh:
    """A mesh with the axes `data` and `model` of config.mesh.

    With mesh.data = -1 it takes all devices. If a batch divides among some of them only, the others
    repeat their work: a third axis, `spare`, runs over these copies.

    Args:
      available: the devices of all processes.
      batch: config key -> its batch size, which the axis `data` must divide.

    Raises:
      UserError: there are too few devices, or the batch does not divide among mesh.data of them.
    """
    count, model = len(available), config.model
    if model < 1 or count % model:
        raise UserError(
            f"mesh.model={model} does not divide the {count} device(s); set it to a divisor"
        )
    ((key, size),) = batch.items()
    data = config.data
    if data == -1:
        data = math.gcd(count // model, size)
    elif not 1 <= data <= count // model:
        each = f" for each of mesh.model={model}" if model > 1 else ""
        raise UserError(
            f"mesh.data={data} is out of range; there are {count // model} device(s){each}: set it "
            "to at most as many, or to -1 for as many as fit"
        )
    elif size % data:
        raise UserError(
            f"{key}={size} does not divide among {data} devices; make it a multiple of {data}, or "
            "set mesh.data to a divisor or to -1"
        )
    spare = count // model // data if config.data == -1 else 1
    if spare > 1:
        warn(
            f"{key}={size} divides among {data} of the {count} devices only, and the others repeat "
            f"their work; make it a multiple of {count // model} to use all"
        )
    if jax.process_count() > 1 and spare * data * model < count:
        raise UserError(
            f"mesh.data={data} leaves devices of the {jax.process_count()} processes idle; set it "
            "to -1"
        )
    return arrange(available, data, model, spare)


def state_shardings(shapes: Any, mesh: Mesh, spec: ModelSpec, fully_sharded: bool) -> Any:
    """Where each array of a training state of these shapes lives, moments beside their parameter.

    Along `model` (tensor parallelism) parameters are cut as they declare. Of two matrices in a row
    the first is cut by its outputs and the second by its inputs, so that what lies between them
    stays where it is and only the sum at the end travels (arXiv 1909.08053, section 3).

    Under full sharding each array of at least FULLY_SHARDED_FROM elements is also cut along `data`,
    at the longest axis that divides, but never along a stack's layers: a scan would have to fetch
    each layer from one device.

    Raises:
      UserError: an axis does not divide among the devices along `model`, or there is none to cut.
    """
    params = {path_text(path) for path, _ in jax.tree.leaves_with_path(shapes["params"])}
    data, model = mesh.shape["data"], mesh.shape["model"]

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # The path of a moment ends in that of its parameter.
        keys, shape = path_text(path).split("/"), leaf.shape
        tails = ("/".join(keys[i:]) for i in range(1, len(keys)))
        name = next((tail for tail in tails if tail in params), None)
        if name is None or not shape:  # an optimizer may keep a single number for a parameter
            return replicated(mesh)
        axes: list[str | None] = [None] * leaf.ndim
        parameter = spec.parameters[name]
        axis = parameter.model_axis
        if model > 1 and axis is not None:
            if shape[axis] % model:
                raise UserError(
                    f"mesh.model={model} does not divide the {shape[axis]} of axis {axis} of "
                    f"{name} {shape}; choose a divisor"
                )
            axes[axis] = "model"
        if fully_sharded and leaf.size >= FULLY_SHARDED_FROM:
            per_layer = range(parameter.is_stacked, leaf.ndim)
            if free := [i for i in per_layer if axes[i] is None and shape[i] % data == 0]:
                axes[max(free, key=lambda i: shape[i])] = "data"
        return NamedSharding(mesh, PartitionSpec(*axes))

    placed = jax.tree.map_with_path(place, shapes)
    if model > 1 and not any("model" in s.spec for s in jax.tree.leaves(placed)):
        raise UserError(
            f"mesh.model={model} finds nothing to cut in this network; set it to 1 "
            "(mesh.fully_sharded=True spreads any network's state)"
        )
    return placed


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or of their shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Each device along `data`, in each slice, holds its part of the array's axis `axis`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, batch_axes(mesh)))


def own_rows(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` that this process's devices hold, ascending, int64 (rows,).

    On a torus they need not lie together.
    """
    held = batched(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique([np.arange(size)[rows] for rows in held if rows is not None])


def put(tree: Any, sharding: NamedSharding) -> Any:
    """A tree of host arrays, which every process has whole, on the devices."""

    def place(leaf: Any) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    with jax.transfer_guard_host_to_device("allow"):  # this transfer is intended
        return jax.tree.map(place, tree)


def put_rows(tree: Any, sharding: NamedSharding, axis: int, size: int) -> Any:
    """Batches of `size` rows along `axis`, of which every process has its `own_rows`."""

    def place(leaf: np.ndarray) -> jax.Array:
        shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(place, tree)


def each(mesh: Mesh) -> NamedSharding:
    """Each device holds one element of an array (devices,)."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def shapes(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes of a tree of arrays that would be placed so."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def put_from_each(value: int, mesh: Mesh) -> jax.Array:
    """Every process's own number, int32, once for each of its devices: (devices,)."""
    own = np.full(1, value, np.int32)
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback((mesh.size,), each(mesh), lambda _: own)
