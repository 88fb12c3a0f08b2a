"""One CPU posing as eight devices, strict JAX and quick compilation, for every test.

JAX_PLATFORMS=cuda,cpu runs the tests on a GPU; tests that need more devices, or a CPU, are skipped.
"""

import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Set before JAX is imported, so that processes that tests start inherit it. A test compiles for
# longer than it computes, so most optimisations are left out; see families.OPTIMISED. Without
# fusion emitters, which XLA always has since jaxlib 0.11, it compiles in half the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ.setdefault("XLA_FLAGS", "")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# gcsfs would ask by gRPC whether a bucket has real folders; it reads this when it is imported.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the workers share a GPU

import jax
import jaxtyping
import pytest

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")

jax.config.update("jax_num_cpu_devices", 8)  # takes effect when the backend starts, later
jax.config.update("jax_numpy_rank_promotion", "raise")
# This process, its workers and the processes that tests start share compiled programs in a folder,
# which is removed in the end unless the user named it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="rezero_jax_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of train.py


def pytest_report_header():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def pytest_collection_finish():
    gc.freeze()  # collections during tests need not visit what the imports made


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """name -> the folder of that family's tiny run, which tests only read; see families.py."""
    from tests.families import train_once  # imports JAX programs, which few tests need

    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' folders are in one folder of the session
        parent = parent.parent
    return lambda name: train_once(name, parent)


@pytest.fixture
def copy_of(trained, tmp_path):
    """(name, step) -> a copy of that run as it was after the checkpoint of `step`, unfinished."""

    def copy(name, step):
        folder = shutil.copytree(trained(name), tmp_path / name)
        (folder / "final.json").unlink()
        for checkpoint in (folder / "checkpoints").iterdir():
            if int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        return folder

    return copy


@pytest.fixture(scope="module")
def server():
    """The storage that gs:// is for this process and those it starts."""
    from tests.gcs.server import serving  # few tests need it

    with serving(["runs"]) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
