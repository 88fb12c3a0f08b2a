"""Installs the requirements that Google Colab lacks: `python notebooks/colab.py` in the project."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement


def main() -> None:
    """Installs them.

    Colab's JAX fits its runtime (CPU, GPU or TPU) and stays as it is, unless it is too old; then
    the newest one for the same device replaces it.
    """
    needs = map(Requirement, Path("requirements.txt").read_text().split())
    lacking = [need for need in needs if _installed(need.name) not in need.specifier]
    old = [need for need in lacking if need.name == "jax"]
    for need in old:
        need.extras = _extras()
    kept = [] if old else [f"{name}=={version(name)}" for name in ("jax", "jaxlib")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *kept, *map(str, lacking)]
    subprocess.run(command, check=True)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "0"


def _extras() -> set[str]:
    """The extra of jax for the accelerator, if there is one."""
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        number = re.search(r"\b(\d{3})\.\d", driver.read_text())
        return {"cuda13" if number and int(number[1]) >= 580 else "cuda12"}
    return {"tpu"} if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists() else set()


if __name__ == "__main__":
    main()
