"""One CPU posing as eight devices, and strict JAX, for every test.

JAX_PLATFORMS=cuda,cpu runs them on a GPU; those that need more devices, or a CPU, are skipped.
"""

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

# Before JAX is imported, and so that processes that tests start have the same.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the workers share a GPU

import jax
import jaxtyping
import pytest

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")

jax.config.update("jax_num_cpu_devices", 8)  # takes effect when the backend starts, later
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of a test is compilation, often of the same: this process, its workers and the processes that
# tests start share a folder, which is removed in the end unless the user named one.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="rezero_jax_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
sys.path.insert(0, str(Path(__file__).parents[1]))  # where train.py lies


def pytest_report_header():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def pytest_runtest_setup(item):
    for marker in item.iter_markers("devices"):
        if jax.device_count() < marker.args[0]:
            pytest.skip(f"needs {marker.args[0]} devices, and there are {jax.device_count()}")
    if item.get_closest_marker("cpu") and jax.default_backend() != "cpu":
        pytest.skip("of what only a CPU does")


@pytest.fixture
def unchecked(monkeypatch):
    """For calls that violate annotations: the code's own checks answer them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose functions compile longer than they run: leaves most optimisation out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def server():
    """The storage that gs:// is for this process and those it starts."""
    from tests.gcs.server import serving  # few tests need it

    with serving(["runs"]) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
