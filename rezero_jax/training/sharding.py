"""The device mesh and who holds what: one code path from one CPU device to many hosts."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rezero_jax.errors import UserError


def make_mesh(config: ConfigDict, batch_sizes: dict[str, int]) -> Mesh:
    """A mesh with the axes `data` and `model` over all devices.

    Args:
      config: config.mesh.
      batch_sizes: config key -> batch size; the axis `data` must divide each.

    Raises:
      UserError: the mesh does not cover the devices, or a batch does not divide.
    """
    count = jax.device_count()
    if config.model != 1:
        raise UserError(
            f"mesh.model is {config.model}, but training is only data parallel; leave it at 1"
        )
    data = count if config.data == -1 else config.data
    if not 1 <= data <= count:
        raise UserError(f"mesh.data={data} needs 1 to {count} devices, those there are; or -1")
    for key, size in batch_sizes.items():
        if size % data:
            raise UserError(
                f"{key}={size} does not divide among {data} devices; "
                f"make it a multiple of {data} or lower mesh.data"
            )
    devices = np.asarray(jax.devices()[:data]).reshape(data, 1)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Each device along `data` holds its part of the array's axis `axis`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """The host arrays of `tree` on the devices."""
    return jax.device_put(tree, sharding)
