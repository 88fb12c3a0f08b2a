"""Which device has which place in the mesh: neighbours talk most, slices least."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rezero_jax.errors import UserError


def arrange(devices: Sequence[jax.Device], data: int, model: int, spare: int = 1) -> Mesh:
    """The mesh of the first spare * data * model devices, with the axes `data` and `model`.

    Devices along an axis are neighbours on a TPU's torus. If the devices lie in several slices,
    whose network is far slower than that within one, the axis `replica` runs over the slices, and
    `data` is what is left of it within one: a batch is cut along both, the state never along
    `replica`. GPUs are a slice if NVLink joins them: a node, as a rule.

    Args:
      devices: of all processes, in any order.
      data: devices that share a batch, in all slices together.
      model: devices that share each weight matrix.
      spare: devices that repeat the work of one; above 1 they have an axis of this name.

    Raises:
      UserError: the mesh does not divide among the slices.
    """
    ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    used = ordered[: spare * data * model]
    slices = [list(group) for _, group in groupby(used, _slice)]
    count = len(slices)
    is_cut = data % count == 0  # else each slice repeats the work of the others
    if len({len(each) for each in slices}) > 1 or not (is_cut or spare % count == 0):
        raise UserError(
            f"mesh.data={data} and mesh.model={model} do not divide among {count} slices; set "
            "mesh.data to -1, and mesh.model to a divisor of the devices of a slice"
        )
    inner = (spare, data // count, model) if is_cut else (spare // count, data, model)
    placed = np.stack([_neighbours(each, inner) for each in slices])
    sizes = {"replica": count, "spare": spare, "data": data // count, "model": model}
    if not is_cut:
        sizes |= {"replica": 1, "data": data}
    axes = [name for name, size in sizes.items() if size > 1 or name in ("data", "model")]
    shape = [sizes[name] for name in axes]
    return Mesh(placed.reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))


def _slice(device: Any) -> int:
    # A TPU has the attribute only where there are several slices. A CPU's network is one.
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", 0)


def _neighbours(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices of a slice in this shape; those of a CPU in their order."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        # A part of a torus, or chips that pose as two devices each.
        return np.asarray(devices).reshape(shape)
