"""The device mesh and what each device holds: one code path from one CPU device to many hosts."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rezero_jax.devices import batch_axes
from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.processes import warn
from rezero_jax.training.state import ModelSpec

# Smaller arrays stay whole under full sharding, because fetching costs more than keeping them.
FULLY_SHARDED_FROM = 1024  # elements


def make_mesh(config: ConfigDict, available: Sequence[jax.Device], key: str, size: int) -> Mesh:
    """The mesh of config.mesh on the `available` devices of all processes; see `place_devices`.

    With mesh.data = -1 the mesh has the most devices among which the batch divides. The batch size
    is `size`, and errors name its config field `key`. Raises a UserError if the mesh does not
    divide the devices, the batch or the slices, or devices of several processes are idle.
    """
    count, model = len(available), config.model
    if model < 1 or count % model:
        raise UserError(f"mesh.model={model} does not divide {count} device(s); choose a divisor")
    most, data = count // model, config.data
    if data == -1:
        data = max(n for n in range(1, most + 1) if size % n == 0)
    elif not 1 <= data <= most or size % data:
        raise UserError(
            f"mesh.data={data} is not one of 1 to {most} devices that divide {key}={size}; set it "
            "to such a number, or to -1 for the largest"
        )
    if data * model < count:
        sentence = (
            f"{key}={size} among mesh.data={data} leaves {count - data * model} of the {count} "
            f"devices idle; make it a multiple of {most}, as a run of several processes must"
        )
        if jax.process_count() > 1:
            raise UserError(sentence)
        if config.data == -1:
            warn(sentence)
    return place_devices(available, data, model)


def place_devices(devices: Sequence[jax.Device], data: int, model: int) -> Mesh:
    """The mesh of the first data * model devices, neighbours on a TPU's torus side by side.

    The axes are `data` and `model`, and `replica` over several slices, which a slow network joins:
    a batch is sharded along `replica` and `data`, the state never along `replica`. GPUs joined by
    NVLink, usually a node, are a slice. Raises a UserError unless the mesh divides among slices.
    """
    ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    used = ordered[: data * model]
    sizes = Counter(map(_slice, used))
    replicas = len(sizes)
    if len(set(sizes.values())) > 1 or data % replicas:
        raise UserError(
            f"mesh.data={data} and mesh.model={model} do not divide among {replicas} slices; set "
            f"mesh.data to a multiple of {replicas}, and mesh.model to a divisor of the devices of "
            "a slice"
        )
    shape = (data // replicas, model)
    try:
        if replicas == 1:
            placed = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
        else:
            placed = mesh_utils.create_hybrid_device_mesh(
                (1, *shape), (replicas, 1, 1), used, allow_split_physical_axes=True
            )
    except (AssertionError, NotImplementedError, ValueError):
        # JAX knows no topology of some devices of a torus, or of chips that pose as two devices.
        placed = np.reshape(np.asarray(used), (replicas, *shape) if replicas > 1 else shape)
    axes = ("replica", "data", "model")[-placed.ndim :]
    return Mesh(placed, axes, axis_types=(AxisType.Auto,) * len(axes))


def _slice(device: jax.Device) -> int:
    """The index of a device's slice; a TPU has the attribute only if there are several slices."""
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", 0)


def state_shardings(shapes: Any, mesh: Mesh, spec: ModelSpec, fully_sharded: bool) -> Any:
    """The sharding of each array of a training state; moments are sharded like their parameter.

    Along `model` (tensor parallelism) parameters are sharded as they declare. The first of two
    consecutive matrices is sharded by its outputs and the second by its inputs, so that only the
    final sum is communicated (arXiv 1909.08053, section 3).

    Under full sharding each array of at least FULLY_SHARDED_FROM elements is also sharded along
    `data`, by its longest axis that divides, but never by a stack's layers: a scan would have to
    fetch each layer from one device. Raises a UserError if an axis does not divide along `model`,
    or no parameter can be sharded along it.
    """
    data, model = mesh.shape["data"], mesh.shape["model"]

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # The path of a moment ends in the path of its parameter.
        keys, shape = path_text(path).split("/"), leaf.shape
        tails = ("/".join(keys[i:]) for i in range(1, len(keys)))
        name = next((tail for tail in tails if tail in spec.parameters), None)
        if name is None or not shape:  # an optimizer may keep one scalar for a parameter
            return replicated(mesh)
        parameter = spec.parameters[name]
        axes: list[str | None] = [None] * leaf.ndim
        if model > 1 and (axis := parameter.model_axis) is not None:
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
            f"mesh.model={model} finds nothing to shard; set it to 1, or mesh.fully_sharded=True"
        )
    return placed


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or of their shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The array's axis `axis` is sharded along the batch axes `replica` and `data`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, batch_axes(mesh)))


def own_rows(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` on this process's devices, ascending, int64 (rows,).

    On a torus the rows need not be adjacent.
    """
    held = batched(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique([np.arange(size)[rows] for rows in held if rows is not None])


def put(tree: Any, sharding: Any) -> Any:
    """Puts NumPy arrays on the devices; each process gives the elements that its devices hold.

    `sharding` is a NamedSharding, or a tree of them that is a prefix of `tree`.
    """
    with jax.transfer_guard_host_to_device("allow"):  # this transfer is intended
        return jax.make_array_from_process_local_data(sharding, tree)
