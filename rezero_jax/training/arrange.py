"""Which device has which place in the mesh: neighbours talk most, slices least."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rezero_jax.errors import UserError


def arrange(devices: Sequence[jax.Device], data: int, model: int) -> Mesh:
    """The mesh of the first data * model devices, with the axes `data` and `model`.

    Devices along an axis are neighbours on a TPU's torus. Those of several slices, whose network is
    far slower than that within one, have the axis `replica` in front, which runs over the slices,
    and `data` is what is left of it within one. A batch is cut along both, the state never along
    `replica`. GPUs are a slice if NVLink joins them: a node, as a rule.

    Args:
      devices: of all processes, in any order.
      data: devices that share a batch, in all slices together.
      model: devices that share each weight matrix.

    Raises:
      UserError: the mesh does not divide among the slices.
    """
    ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    slices = [list(group) for _, group in groupby(ordered[: data * model], _slice)]
    size = data * model // len(slices)
    if any(len(each) != size for each in slices) or size % model:
        raise UserError(
            f"mesh.data={data} and mesh.model={model} do not divide among {len(slices)} slices; "
            "set mesh.data to -1, and mesh.model to a divisor of the devices of a slice"
        )
    placed = np.stack([_neighbours(each, (size // model, model)) for each in slices])
    if len(slices) == 1:
        return Mesh(placed[0], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return Mesh(placed, ("replica", "data", "model"), axis_types=(AxisType.Auto,) * 3)


def _slice(device: Any) -> int:
    # A TPU has the attribute only where there are several slices. A CPU's network is one.
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", 0)


def _neighbours(devices: list[jax.Device], shape: tuple[int, int]) -> np.ndarray:
    """The devices of a slice in this shape; those of a CPU in their order."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        # A part of a torus, or chips that pose as two devices each.
        return np.asarray(devices).reshape(shape)
