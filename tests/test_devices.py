"""A CPU that poses as several devices, its name, and the cache folder."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from rezero_jax import devices
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.files import write_json
from rezero_jax.runs.folder import check_config, continued


def test_cpu_devices_divide_the_usual_batches(monkeypatch):
    for cores, count in ((1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 4), (64, 4)):
        monkeypatch.setattr(devices, "cores", lambda cores=cores: cores)
        assert devices.default_cpu_devices() == count


def test_devices_of_a_cpu_that_has_started_stay():
    jax.devices()
    with pytest.raises(UserError, match="cpu_devices=2 comes too late"):
        devices.set_cpu_devices(2)


def test_the_target_is_the_current_mesh():
    here = jax.devices()[0]
    assert devices.target() == (here.platform, here.device_kind)
    with jax.default_device(jax.devices()[1]):
        assert devices.target() == (here.platform, here.device_kind)
    with jax.default_device("cpu"):
        assert devices.target().platform == "cpu"
    chip = AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=chip)
    found = []
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda x: found.append(devices.target()), 1.0)
    assert found == [("tpu", "TPU v5 lite")]


KEEP = """
import jax
from rezero_jax.devices import cache_compilations
cache_compilations()
print(jax.config.jax_compilation_cache_dir)
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
"""


def keep(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")} | variables
    command = [sys.executable, "-c", f"import os; os.umask(0)\n{KEEP}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_compiled_programs_are_kept(named, tmp_path):
    folder, variables = tmp_path / "cache" / "rezero_jax" / "xla" / platform.node(), {}
    if named:
        folder = tmp_path / named
        variables["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    assert keep(tmp_path, **variables).stdout.strip() == str(folder)
    kept = list(tmp_path.rglob("*-cache"))
    assert kept == list(folder.glob("*-cache")) != []
    # Nobody else may write what JAX executes.
    private = folder if named else tmp_path / "cache" / "rezero_jax"
    assert private.stat().st_mode & 0o777 == 0o700
    if named:  # an entry that a full disk truncated is replaced
        whole = {path: path.stat().st_size for path in kept}
        for path in kept:
            path.write_bytes(path.read_bytes()[:9])
        [warning] = keep(tmp_path, **variables).stderr.splitlines()
        assert warning.startswith(f"warning: reading compiled programs in {folder} failed (")
        assert {path: path.stat().st_size for path in kept} == whole
        assert keep(tmp_path, **variables).stderr == ""


def test_without_a_home_of_this_user_there_is_no_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "rezero_jax"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert devices.cache_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700

    def fail(*args: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", fail)  # as for the folder of another user
        assert devices.cache_folder() is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # root in another user's home
        assert devices.cache_folder() is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert devices.cache_folder() is None
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without an entry
    assert devices.cache_folder() is None


def test_the_dtype_suits_the_platform_and_a_run_keeps_the_one_with_which_it_began(tmp_path):
    platforms = {"cpu": "float32", "tpu": "bfloat16", "gpu": "bfloat16"}
    assert {name: devices.compute_dtype("auto", name) for name in platforms} == platforms
    assert devices.compute_dtype("float32", "tpu") == "float32"
    config = load_config("configs/transformer_small.py:smoke")
    assert config.model.dtype == "auto"
    began = config.copy_and_resolve_references()
    began.model.dtype = "bfloat16"  # on an accelerator
    write_json(tmp_path / "config.json", json.loads(began.to_json()))
    assert continued(tmp_path, config).model.dtype == "bfloat16"
    config.model.dtype = "float32"
    with pytest.raises(UserError, match=r"model\.dtype"):
        check_config(tmp_path, config)
