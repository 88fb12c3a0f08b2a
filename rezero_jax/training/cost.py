"""What a run costs its devices: floating-point operations, and the memory of its state."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from rezero_jax.data.split import HostBatch
from rezero_jax.errors import UserError
from rezero_jax.training.sharding import device_bytes
from rezero_jax.training.trainer import Trainer

# bfloat16 operations a second at best, matrix products without sparsity, by the beginning of JAX's
# `device_kind`: cloud.google.com/tpu/docs/system-architecture and NVIDIA's data sheets. A device of
# v4 and v5p is a chip of two cores; a device of tpu7x is half a chip.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "TPU7x": 1153e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
# Operations that only move or name numbers.
MOVES = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "convert_element_type", "copy"}
MOVES |= {"concatenate", "slice", "split", "stop_gradient"}


def chip_kind(device: Any) -> str | None:
    """The longest key of PEAK_FLOPS with which a device's kind begins; None if there is none."""
    return max(filter(device.device_kind.startswith, PEAK_FLOPS), key=len, default=None)


def peak_flops(trainer: Trainer) -> float | None:
    """Operations a second of all devices of a trainer at their peak; None if it is unknown."""
    kind = chip_kind(trainer.mesh.devices.flat[0])
    return None if kind is None else PEAK_FLOPS[kind] * trainer.mesh.size


def flops(function: Callable[..., Any], *args: Any, everything: bool = False) -> int:
    """Multiplications and additions of the matrix products and convolutions in function(*args).

    The body of a scan counts once for each iteration. The costliest branch of a `cond` counts, and
    one iteration of a `while` loop.

    Args:
      *args: arrays or their shapes; nothing is computed.
      everything: also count each number that an elementwise operation makes or a reduction takes.
    """
    return _total(jax.make_jaxpr(function)(*args).jaxpr, everything)


def first_batch(trainer: Trainer) -> tuple[HostBatch, HostBatch]:
    """The resident training data and the fetched data of one batch, which repeats one example."""
    train = trainer.dataset.train
    indices = np.zeros(trainer.config.train.batch_size, np.int32)
    return dict(train.resident), train.fetch(indices)


def update_flops(trainer: Trainer) -> int:
    """Floating-point operations of an update, rematerialisation included; see `flops`."""
    batch = jax.eval_shape(trainer.dataset.train.gather, *first_batch(trainer))
    return flops(trainer.train_step, trainer.shapes, batch)


def model_flops(trainer: Trainer) -> int:
    """Model FLOPs per update, excluding rematerialisation; used for MFU.

    Attention counts every query with every key, also where it is causal (arXiv 2204.02311, B).
    """
    config = trainer.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.remat = "none"
        if "attention" in config.model:
            config.model.attention = "plain"
        config.mesh.data = config.mesh.model = 1  # the count is the same on any mesh
    return update_flops(Trainer(config, trainer.dataset, [trainer.mesh.devices.flat[0]]))


def check_memory(trainer: Trainer) -> None:
    """Raises a UserError if the training state does not fit; XLA would abort the process."""
    device = trainer.mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    need = device_bytes(trainer.shapes)
    if limit is None:  # the devices of a CPU share the machine's memory
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        need *= len(trainer.mesh.local_devices)
    if need > limit:
        raise UserError(
            f"the parameters and the optimizer's state take {need / 1e9:,.1f} GB and there are "
            f"{limit / 1e9:,.1f} GB of memory; choose a smaller model or more devices"
        )


def _total(jaxpr: core.Jaxpr, everything: bool) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        values = jax.tree.leaves(equation.params)
        parts = [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in values]
        inner = [_total(part, everything) for part in parts if isinstance(part, core.Jaxpr)]
        if name in ("dot_general", "conv_general_dilated"):
            total += _product(equation)
        elif inner:
            trips = equation.params["length"] if name == "scan" else 1
            total += trips * (max(inner) if name == "cond" else sum(inner))
        elif everything and name not in MOVES:
            arrays: list[Any] = equation.invars if name.startswith("reduce_") else equation.outvars
            total += math.prod(arrays[0].aval.shape)
    return total


def _product(equation: core.JaxprEqn) -> int:
    arrays: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
    left, right, out = (array.shape for array in arrays)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        terms = math.prod(left[axis] for axis in contracted)
    else:
        out_features = right[equation.params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(right) // out_features
    return 2 * terms * math.prod(out)
