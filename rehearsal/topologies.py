"""Devices of absent TPU and GPU topologies, for compilation only.

`pip install "jax[tpu]"` and `pip install "jax[cuda13]"` install the compilers.
"""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from rezero_jax.errors import UserError, choose_from, first_line

GPU_NODE = 8  # GPUs per host

# XLA's description of an H100 SXM, for compilation without the device. An H200 has the same
# processor and more memory.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_GPUS = {
    "h100": _H100,
    "h200": _H100.replace("3352320000000", "4800000000000")
    .replace("84942979072", "150754820096")
    .replace("H100 80GB HBM3", "H200"),
}


class NoCompiler(UserError):
    """The compiler of a topology is not installed."""


def devices_of(name: str) -> list[jax.Device]:
    """The devices of a topology, for `Trainer(..., devices=)`.

    Args:
      name: "v5e:2x4", a TPU generation and the chips along each axis of its torus; "2xv5e:4x4", two
        slices connected by the data-centre network; "1xh200", or "16xh100", 16 GPUs on hosts with 8
        GPUs each.

    Raises:
      UserError: the topology is unknown.
      NoCompiler: its compiler is not installed.
    """
    tpu = re.fullmatch(r"(?:(\d+)x)?(v4|v5e|v5p|v6e|tpu7x):(\d+(?:x\d+){1,2})", name)
    gpu = re.fullmatch(r"(\d+)x(h100|h200)", name)
    if tpu:
        return _tpus(tpu[2], tpu[3], int(tpu[1] or 1))
    if gpu and int(gpu[1]) > 0 and (int(gpu[1]) <= GPU_NODE or int(gpu[1]) % GPU_NODE == 0):
        return _gpus(gpu[2], int(gpu[1]))
    raise choose_from(
        "topology",
        name,
        ("v5e:2x2", "v5e:2x4", "v5e:16x16", "v5p:4x4x4", "v6e:2x4", "8xh100", "1xh200"),
    )


def _tpus(generation: str, shape: str, slices: int) -> list[jax.Device]:
    # Without these variables, libtpu waits minutes for the metadata server of a TPU VM.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)
    sides = [int(side) for side in shape.split("x")]
    options: dict[str, Any] = {"num_slices": slices}
    if generation in ("v4", "v5p", "tpu7x"):
        sides += [1] * (3 - len(sides))
        shape = "x".join(map(str, sides))
    if all(side == 1 for side in sides):
        options["chips_per_host_bounds"] = [1, 1, 1]
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(
            f"compiling for {generation} needs the TPU's compiler; run "
            f'pip install "jax[tpu]=={jax.__version__}"'
        )
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{shape}", **options
        )
    except Exception as error:
        raise UserError(
            f"the TPU's compiler rejects {generation}:{shape} ({first_line(error)}); choose "
            "another shape, such as v5e:2x4"
        ) from None
    return list(found.devices)


def _gpus(kind: str, count: int) -> list[jax.Device]:
    nodes, per_node = max(count // GPU_NODE, 1), min(count, GPU_NODE)
    try:
        import jax_plugins.xla_cuda13  # noqa: F401
        from jaxlib import xla_client
    except ImportError:
        raise NoCompiler(
            f"compiling for the {kind.upper()} needs JAX's CUDA plugin; run "
            f'pip install "jax[cuda13]=={jax.__version__}"'
        ) from None
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.devices("cpu")  # loads the plugins
    try:  # these functions are private to jaxlib, so the next version may move them
        topology = xla_client._xla.get_default_c_api_topology(
            "cuda", "", {"target_config": _GPUS[kind], "topology": f"1x{nodes}x{per_node}"}
        )
        return list(topology._make_compile_only_devices())
    except Exception as error:
        raise NoCompiler(
            f"this version of jaxlib does not compile for absent GPUs ({first_line(error)}); "
            "install jax 0.10.2"
        ) from None
