"""Installs the requirements that Google Colab lacks: `python notebooks/colab.py` in the project."""

import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main() -> None:
    """Installs them; Colab's JAX fits its runtime (CPU, GPU or TPU) and stays as it is."""
    installed = {canonicalize_name(found.name): found.version for found in distributions()}
    needs = [Requirement(line) for line in Path("requirements.txt").read_text().split()]
    lacking = [
        str(need)
        for need in needs
        if need.name != "jax"
        and installed.get(canonicalize_name(need.name), "") not in need.specifier
    ]
    kept = [f"{name}=={version(name)}" for name in ("jax", "jaxlib")]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *kept, *lacking], check=True)


if __name__ == "__main__":
    main()
