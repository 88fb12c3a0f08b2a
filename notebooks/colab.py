"""Installs the requirements that Google Colab lacks: `python notebooks/colab.py` in the project."""

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main() -> None:
    """Installs them.

    Colab's JAX fits its runtime (CPU, GPU or TPU) and stays as it is, unless it is too old; then
    the newest one for the same device replaces it.
    """
    installed = {str(canonicalize_name(found.name)): found.version for found in distributions()}
    lacking = []
    for need in map(Requirement, Path("requirements.txt").read_text().split()):
        if installed.get(canonicalize_name(need.name), "") not in need.specifier:
            lacking.append(need)
    old = [need for need in lacking if need.name == "jax"]
    for need in old:
        need.extras = {"cuda13"} if Path("/dev/nvidia0").exists() else _tpu()
    kept = [] if old else [f"{name}=={installed[name]}" for name in ("jax", "jaxlib")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *kept, *map(str, lacking)]
    subprocess.run(command, check=True)


def _tpu() -> set[str]:
    return {"tpu"} if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists() else set()


if __name__ == "__main__":
    main()
