"""The machine of a process: what it computes for, its cores as devices, its cache folder."""

import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

import jax

from rezero_jax.errors import UserError

MOST_CPU_DEVICES = 1024  # starting more takes minutes


class Target(NamedTuple):
    """What a computation is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: JAX's `device_kind`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
    """

    platform: str
    kind: str


def target() -> Target:
    """The devices of the mesh in whose context we trace (`jax.set_mesh`), or JAX's default ones.

    A mesh may be of devices that are not here, for which a program is only compiled.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]
        device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return Target(device.platform, device.device_kind)


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """The model of this machine's CPU, or its architecture where the system does not tell."""
    try:
        told = Path("/proc/cpuinfo").read_text()  # Linux only
    except OSError:
        told = ""
    model = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def cache_folder() -> Path:
    """The folder of what can be made again: $XDG_CACHE_HOME/rezero_jax, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rezero_jax"


def cache_compilations() -> None:
    """Has JAX keep its compilations in the cache folder, so that a restart compiles nothing.

    $JAX_COMPILATION_CACHE_DIR overrides the folder, and may name one in a bucket, which the hosts
    of a run share; empty, it turns the cache off. Otherwise each host has a folder of its own,
    because hosts with different processors may share a home.
    """
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None:
        folder = str(cache_folder() / "xla" / platform.node())
        jax.config.update("jax_compilation_cache_dir", folder)
    if "://" in folder:  # XLA's own cache would look for it on the disk
        jax.config.update("jax_persistent_cache_enable_xla_caches", "")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_cpu_devices() -> int:
    """The number of CPU devices that suits convolutions, which use only one core of a device.

    It is the largest power of two up to the number of cores and 4: this divides the usual batches,
    and leaves enough images to each device.
    """
    return 2 ** min(cores().bit_length() - 1, 2)


def set_cpu_devices(count: int) -> None:
    """Makes JAX see the CPU as `count` devices; accelerators are unaffected.

    Raises:
      UserError: the count is out of range, or JAX has already started its devices.
    """
    if not 1 <= count <= MOST_CPU_DEVICES:
        raise UserError(f"mesh.cpu_devices={count} is out of range; give 1 to {MOST_CPU_DEVICES}")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise UserError(
            f"mesh.cpu_devices={count} comes too late, as JAX has started in this process; set it "
            "to None"
        ) from None


def compute_dtype(name: str, platform: str | None = None) -> str:
    """The dtype that a model computes in: `name`, or of "auto" the one that suits a platform.

    Accelerators multiply bfloat16 at their full rate; a CPU is slow at it.

    Args:
      platform: "cpu", "gpu", "tpu"; by default that of `target`.
    """
    if name != "auto":
        return name
    return "float32" if (platform or target().platform) == "cpu" else "bfloat16"


def generator(platform: str) -> str:
    """The kind of JAX's random keys in training on "cpu", "tpu", "gpu".

    Accelerators draw random bits by "rbg": with "threefry2x32" they take more time in a deep
    Transformer with dropout than all its matrix products (docs/accelerators.md).
    """
    return "threefry2x32" if platform == "cpu" else "rbg"


def use_cpu() -> None:
    """Leaves accelerators alone, if JAX has not started yet: to compile for others needs none."""
    jax.config.update("jax_platforms", "cpu")
