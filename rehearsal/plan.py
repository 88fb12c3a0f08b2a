"""Plans memory, FLOPs and time of a run before it trains: `train.py --plan`."""

import math
import re
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rehearsal.estimate import chip_of, collectives, estimate
from rehearsal.topologies import devices_of
from rezero_jax.data import stand_in
from rezero_jax.errors import UserError
from rezero_jax.formatting import duration
from rezero_jax.processes import is_out_of_memory
from rezero_jax.training.cost import first_batch, update_flops
from rezero_jax.training.sharding import device_bytes
from rezero_jax.training.trainer import Trainer

OPERATIONS = 8  # number of the costliest operations to show
WIDTH = 30  # characters in the column of names


def plan(config: ConfigDict, topology: str | None = None) -> dict[str, Any]:
    """Plans the run of `config`, as JSON data; `render` formats the plan as text.

    Args:
      config: a config of train.py.
      topology: devices to compile for, see `topologies.devices_of` (default: this machine's
        devices, which run some updates to measure their time).

    Raises:
      UserError: the config is invalid, the topology is unknown, its compiler is missing, or the run
        does not fit in memory.
    """
    trainer = trainer_for_sizes(config, None if topology is None else devices_of(topology))
    mesh, shapes = trainer.mesh, trainer.shapes
    started = time.perf_counter()
    compiled = _compile(trainer, topology)
    compile_seconds = time.perf_counter() - started
    found = estimate(compiled)
    flops = update_flops(trainer)
    chip = chip_of(mesh.devices.flat[0])
    splits = (trainer.dataset.train, trainer.dataset.eval)
    resident = sum(leaf.nbytes for leaf in jax.tree.leaves([split.resident for split in splits]))
    account: dict[str, Any] = {
        "topology": topology or "here",
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "fully_sharded": config.mesh.fully_sharded,
        "parameters": trainer.spec.parameter_count,
        "updates": trainer.intervals.total,
        "updates_per_dispatch": config.train.steps_per_dispatch,
        "batch_size": trainer.intervals.batch_size,
        "bytes": {
            "parameters": device_bytes(shapes["params"]),
            "optimizer state": device_bytes(shapes["opt_state"]),
            "data": resident,
            "gradients, activations": max(found.memory - device_bytes(shapes) - resident, 0),
            "used": found.memory,
            "available": chip and chip.memory,
        },
        "flops": flops,
        "compile_seconds": compile_seconds,
        "collectives": collectives(found.update, mesh.size),
        "kernels": dict(found.update.kernels) if chip and chip.hertz else {},
    }
    if chip is not None:
        account["bound_by_flops"] = flops / (mesh.size * chip.flops)
        account["bound_by_bytes"] = found.update.bytes.total() / chip.bandwidth
    if topology is None:
        account["measured"] = _seconds_per_update(trainer)
    elif chip is not None:
        account["estimate"] = found.update.seconds(chip, flops / mesh.size)
        account["kernels_at_least"] = found.update.kernel_seconds(chip)
        account["estimate_of_a_dispatch"] = found.dispatch.seconds(chip)
        costs = found.update.cycles if chip.hertz else found.update.bytes
        account["operations"] = {
            name: count / costs.total() for name, count in costs.most_common(OPERATIONS)
        }
        account["launches"] = found.update.launches
        account["bytes_moved"] = found.update.bytes.total()
        account["convolutions"] = found.update.convolutions
        if chip.hertz is None:
            account["gpu_parts"] = found.update.gpu_parts(chip, flops / mesh.size)
    return account


def render(account: dict[str, Any]) -> str:
    """Formats the result of `plan` as lines of text."""
    size = account["bytes"]
    mesh = " x ".join(f"{name} {count}" for name, count in account["mesh"].items())
    spread = "sharded over data" if account["fully_sharded"] else "replicated along data"
    limit = f" of {_size(size['available'])}" if size["available"] else ""
    rows = [
        ("parameters", f"{account['parameters']:,}"),
        (
            "devices",
            f"{math.prod(account['mesh'].values())} x {account['device']} ({mesh}; the state "
            f"{spread})",
        ),
        ("updates", f"{account['updates']:,} of {account['batch_size']:,} examples"),
        ("bytes of a device", f"{_size(size['used'])}{limit}"),
        *((f"  {name}", _size(size[name])) for name in list(size)[:4]),
        ("FLOPs of an update", f"{account['flops']:.3g}, in matrix products and convolutions"),
    ]
    bounds = [account[name] for name in ("bound_by_flops", "bound_by_bytes") if name in account]
    if bounds:
        rows.append(
            ("an update, at least", " by FLOPs, ".join(map(_time, bounds)) + " by bytes of memory")
        )
    seconds = account.get("measured") or account.get("estimate")
    if seconds and "measured" in account:
        rate = f"{account['flops'] / seconds:.3g} FLOP/s"
        rows.append(("an update", f"{_time(seconds)}, {rate} (measured here)"))
    elif seconds:
        share = f"{account['bound_by_flops'] / seconds:.1%} of the peak"
        parts = account.get("gpu_parts", {})
        whence = " + ".join(f"{_time(part)} of {name}" for name, part in parts.items())
        whence = whence or "the compiler's estimate"
        rows += [
            ("an update", f"{_time(seconds)} by {whence}, {share}"),
            ("  and a dispatch", f"{_time(account['estimate_of_a_dispatch'])} outside its updates"),
        ]
        if parts:
            rows.append(("  launches", f"{account['launches']:,}"))
            if count := account["convolutions"]:
                rows.append(
                    ("  convolutions", f"{count:,}, each predicted as a copy of its arrays")
                )
            rows.append(("  bytes moved", f"{_size(account['bytes_moved'])}, of which"))
        rows += [
            (f"  {name}"[: WIDTH - 1], f"{part:.1%}")
            for name, part in account["operations"].items()
        ]
    if seconds:
        dispatches = account["updates"] / account["updates_per_dispatch"]
        total = account["updates"] * seconds + dispatches * account.get("estimate_of_a_dispatch", 0)
        rows.append(("the run", f"{duration(total)}, without evaluations and saves"))
    for one in account["collectives"]:
        what = f"{one['count']:,} x {_size(one['bytes'])} among {one['devices']} devices"
        rows.append((one["kind"], what))
    if account["kernels"]:
        least = account.get("kernels_at_least")
        names = ", ".join(account["kernels"])
        rows.append(("without estimate", names + (f": at least {_time(least)}" if least else "")))
    rows.append(("compiled in", f"{account['compile_seconds']:.1f} s"))
    return "\n".join(f"{name:<{WIDTH}}{value}".rstrip() for name, value in rows)


def trainer_for_sizes(config: ConfigDict, devices: list[jax.Device] | None = None) -> Trainer:
    """The Trainer of a config, on zeros instead of a data set that needs a download."""
    return Trainer(config, stand_in(config.data), devices)


def compile_dispatch(trainer: Trainer) -> jax.stages.Compiled:
    """Compiles the updates of one dispatch for the trainer's devices, which may be absent."""
    mesh, (rows, whole, each) = trainer.mesh, trainer.placement
    resident, batch = first_batch(trainer)
    steps = trainer.config.train.steps_per_dispatch
    shape = jax.ShapeDtypeStruct
    args = (
        {name: shape(x.shape, x.dtype, sharding=whole) for name, x in resident.items()},
        {name: shape((steps, *x.shape), x.dtype, sharding=rows) for name, x in batch.items()},
        shape((), jnp.int32, sharding=whole),
        shape((mesh.size,), jnp.int32, sharding=each),
    )
    with jax.set_mesh(mesh):
        return trainer.jitted_dispatch.lower(trainer.shapes, *args).compile()


def _compile(trainer: Trainer, topology: str | None) -> jax.stages.Compiled:
    try:
        return compile_dispatch(trainer)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sizes = re.findall(r"\(([\d.]+[KMGT])\)", str(error))
        need = f"needs {sizes[0]} of the {sizes[1]}" if len(sizes) > 1 else "needs more than the"
        raise UserError(
            f"this run {need} bytes of memory of a device of {topology or 'this machine'}; raise "
            "train.accumulate, set model.remat=full or mesh.fully_sharded=True, or use more "
            "devices"
        ) from None


def updates_of(trainer: Trainer) -> Callable[[int], None]:
    """A function that runs n updates of the trainer and waits for them."""
    state, batches = trainer.init(), trainer.batches(0)
    dispatch = trainer.config.train.steps_per_dispatch

    def updates(count: int) -> None:
        nonlocal state
        for start in range(0, count, dispatch):
            many = list(islice(batches, min(dispatch, count - start)))
            state, report = trainer.dispatch(state, many)
        jax.block_until_ready((state, report))

    return updates


def _seconds_per_update(trainer: Trainer) -> float:
    """Seconds per update of the fastest of three dispatches, or of fewer in a shorter run."""
    total = trainer.intervals.total
    count = min(trainer.config.train.steps_per_dispatch, total)
    updates, seconds = updates_of(trainer), math.inf
    for _ in range(min(3, total // count)):  # the first one compiles
        started = time.perf_counter()
        updates(count)
        seconds = min(seconds, (time.perf_counter() - started) / count)
    return seconds


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
