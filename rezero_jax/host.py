"""A CPU as several devices: what makes use of all its cores."""

import os

import jax

from rezero_jax.errors import UserError


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def host_devices() -> int:
    """How many devices a CPU should pose as for convolutions, which use one core of a device.

    The largest power of two up to the number of cores and 4: it divides the usual batches, and
    leaves each device images enough.
    """
    return 2 ** min(cores().bit_length() - 1, 2)


def pose_as(count: int) -> None:
    """Makes the CPU pose as `count` devices, which share its cores; other devices are unaffected.

    Each device runs on its own thread. Those threads share one pool that XLA sizes for a single
    device, and two that use it at once only hinder each other, so it gets a device's share of the
    cores. XLA reads the pool's size from the environment alone.

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
    if count > 1:
        os.environ.setdefault("NPROC", str(max(1, cores() // count)))
