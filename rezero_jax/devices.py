"""The machine a process runs on: its cores as devices, and its cache folder."""

import os
import platform
from pathlib import Path

import jax

from rezero_jax.errors import UserError


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/rezero_jax, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rezero_jax"


def keep_compiled() -> None:
    """Keeps what JAX compiles in the cache folder, so that a restart compiles nothing.

    Unless $JAX_COMPILATION_CACHE_DIR says where, which may be empty: nowhere. Each host has a
    folder of its own, as homes are shared by hosts whose processors differ.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update(
            "jax_compilation_cache_dir", str(cache_folder() / "xla" / platform.node())
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def host_devices() -> int:
    """How many devices a CPU should pose as for convolutions, which use one core of a device.

    The largest power of two up to the number of cores and 4: it divides the usual batches, and
    leaves each device images enough.
    """
    return 2 ** min(cores().bit_length() - 1, 2)


def pose_as(count: int) -> None:
    """Makes the CPU pose as `count` devices; other devices are unaffected.

    Raises:
      UserError: JAX has started its devices already.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise UserError(
            f"mesh.cpu_devices={count} comes too late, as JAX has started in this process; set it "
            "to None"
        ) from None
