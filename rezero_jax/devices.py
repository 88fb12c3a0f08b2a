"""The machine of a process: its devices, cores, dtype and cache folder.

Only entry points call `cache_compilations`, `set_cpu_devices` and `use_cpu`: they change JAX's
config for the whole process.
"""

import contextlib
import math
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from rezero_jax.errors import UserError, check_between, first_line

# Bytes of memory of the GPUs that we know, by the beginning of JAX's `device_kind`.
GPU_MEMORY = {"NVIDIA A100": 40e9, "NVIDIA H100": 80e9, "NVIDIA H200": 141e9}

MOST_CPU_DEVICES = 1024  # starting more takes minutes


class Target(NamedTuple):
    """The devices for which a computation is traced."""

    platform: str  # cpu, gpu, tpu
    kind: str  # JAX's `device_kind`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite"


def target() -> Target:
    """The devices of the current mesh (`jax.set_mesh`), or JAX's default devices without a mesh.

    The devices of a mesh may be absent: programs are then only compiled for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return Target(device.platform, device.device_kind)


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of a mesh along which a batch is sharded; see rezero_jax.training.sharding.

    Along explicit axes, and manual ones inside jax.shard_map, the caller shards the batch.
    """
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in ("replica", "data") if types.get(axis) == AxisType.Auto)


def check_auto(x: jax.Array | np.ndarray) -> None:
    """Raises a UserError for an array that is sharded along explicit axes of a mesh."""
    if any(jax.typeof(x).sharding.spec):
        raise UserError(
            "this model does not take arrays sharded along explicit mesh axes; make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto,) * number of axes"
        )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards of a batch; 1 without a mesh."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def cores() -> int:
    """Number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """Model name of this machine's CPU, or its architecture if the system does not report one."""
    try:
        report = Path("/proc/cpuinfo").read_text(errors="replace")  # Linux only
    except OSError:
        report = ""
    model = re.search(r"^model name\s*: (.+)$", report, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def cache_folder() -> Path | None:
    """Folder of files that can be made again, in $XDG_CACHE_HOME (default: ~/.cache).

    Only its owner may read or write it, because compiled programs are executed. None if there is no
    home, or the folder cannot be written or is another user's.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rezero_jax"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        is_own = folder.stat().st_uid == os.geteuid()  # root may change the mode of any folder
    except (OSError, RuntimeError):  # a RuntimeError of Path.home
        return None
    return folder if is_own else None


def cache_compilations() -> None:
    """Makes JAX keep compiled programs, so that a restart compiles nothing.

    JAX executes what it finds in the folder. $JAX_COMPILATION_CACHE_DIR names it, perhaps in a
    bucket; empty, it disables the cache. By default each host has its own folder in `cache_folder`,
    as hosts with different processors may share a home.
    """
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None:
        parent = cache_folder()
        folder = "" if parent is None else str(parent / "xla" / platform.node())
        jax.config.update("jax_compilation_cache_dir", folder)
    if "://" in folder:  # XLA's own cache reads disks alone
        jax.config.update("jax_persistent_cache_enable_xla_caches", "")
    elif folder and not Path(folder).exists():
        with contextlib.suppress(OSError):  # JAX will say that it cannot write
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            Path(folder).mkdir(mode=0o700)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _handle_cache_warnings(folder)


def _handle_cache_warnings(folder: str) -> None:
    """Prints one line on a cache that fails, and deletes entries that JAX cannot read or write.

    JAX warns of each program, and keeps an entry that a full disk or a kill has truncated.
    """
    show, told = warnings.showwarning, set[str]()

    def handle(message: Warning | str, *others: Any, **options: Any) -> None:
        found = re.match(r"Error (\w+) persistent .* entry for '(.+?)': (.*)", str(message))
        if found is None:
            show(message, *others, **options)
            return
        action, program, why = found.groups()
        if "://" not in folder:
            for path in Path(folder).glob(f"{program}-*-cache"):
                with contextlib.suppress(OSError):
                    path.unlink()
        if action not in told:
            told.add(action)
            print(
                f"warning: {action} compiled programs in {folder} failed ({why})", file=sys.stderr
            )

    warnings.showwarning = handle


def check_platform() -> None:
    """Starts JAX's devices; raises a UserError if there are none of the platforms that it is told.

    Call it after the processes of a run are connected.
    """
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        # Where the plug-in of a platform is missing, JAX asserts without a message.
        named = jax.config.jax_platforms  # type: ignore[attr-defined]
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={named} ({first_line(error)}); set it to cpu, "
            "or install JAX for the accelerator"
        ) from None


def default_cpu_devices() -> int:
    """Number of CPU devices for convolutions, each of which uses only one core of a device.

    A power of two divides the usual batches; at most 4 leaves enough images to each device.
    """
    return 2 ** min(cores().bit_length() - 1, 2)


def set_cpu_devices(count: int) -> None:
    """Makes JAX see the CPU as `count` devices.

    Raises a UserError if the count is out of range, or JAX has already started its devices.
    """
    check_between(1, count, MOST_CPU_DEVICES, "mesh.cpu_devices")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise UserError(
            f"mesh.cpu_devices={count} comes too late, as JAX has started; set it to None"
        ) from None


def compute_dtype(name: str, platform: str | None = None) -> str:
    """The dtype in which a model computes: `name`, or for "auto" the fastest on a platform.

    The platform is "cpu", "gpu" or "tpu", by default that of `target`.
    """
    if name != "auto":
        return name
    return "float32" if (platform or target().platform) == "cpu" else "bfloat16"


def generator(platform: str) -> str:
    """Implementation of the random keys for training on a "cpu", "tpu" or "gpu".

    On a TPU, "threefry2x32" would draw the bits of dropout for longer than all matrix products of a
    deep Transformer take; on a GPU, "rbg" takes kernels of its own (docs/accelerators.md).
    """
    return "rbg" if platform == "tpu" else "threefry2x32"


def gpu_memory(kind: str) -> float | None:
    """Bytes that JAX takes by default of a GPU of this `device_kind`; None if it is unknown.

    The name decides, not what is free, so that a run on the same GPU has the same microbatches.
    """
    return next((0.75 * size for name, size in GPU_MEMORY.items() if kind.startswith(name)), None)


def use_cpu() -> None:
    """Makes JAX ignore accelerators, as when it compiles for absent devices."""
    jax.config.update("jax_platforms", "cpu")
