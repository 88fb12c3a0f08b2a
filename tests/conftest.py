"""One CPU posing as eight devices, and strict JAX, for every test."""

import importlib.metadata

import jax

DEVICES = 8
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")

jax.config.update("jax_num_cpu_devices", DEVICES)  # takes effect when the first array is made
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_report_header():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
