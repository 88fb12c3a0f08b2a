"""Imports point one way, and a file is short enough to read in one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a file imports what stands on its own line or above.
LAYERS = (
    ("rezero_jax.errors", "rezero_jax.formatting"),
    ("rezero_jax.fields",),
    ("rezero_jax.ranges",),
    ("rezero_jax.config", "rezero_jax.devices", "rezero_jax.processes", "rezero_jax.residual"),
    ("rezero_jax.stack",),
    ("rezero_jax.models", "rezero_jax.data", "rezero_jax.runs"),
    ("rezero_jax.training",),
    ("rezero_jax.analysis", "rezero_jax.export"),
    ("configs",),
    ("launch",),
    ("rehearsal",),
    ("experiments", "benchmarks", "train", "sample"),
)
FLOOR = {unit: floor for floor, units in enumerate(LAYERS) for unit in units}
APART = (("rezero_jax.models", "rezero_jax.data"), ("rezero_jax.models", "rezero_jax.runs"))


def unit_of(module):
    """The longest name of LAYERS that the module is or lies in; None for what others wrote."""
    parts = module.split(".")
    names = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR), None)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


SOURCES = [
    path
    for top in ("rezero_jax", "configs", "launch", "experiments", "benchmarks", "rehearsal")
    for path in sorted((ROOT / top).rglob("*.py"))
] + [ROOT / "train.py", ROOT / "sample.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    here = unit_of(module)
    if here is None:
        assert module == "rezero_jax.__init__"  # the package's face may import all models
        return
    for target in filter(None, map(unit_of, imports_of(path))):
        assert FLOOR[target] <= FLOOR[here], f"{module} imports {target}"
        assert (here, target) not in APART, f"{module} imports {target}"


def test_no_file_is_too_long_to_read_in_one_sitting():
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert {path.name: lines for path, lines in lengths.items() if lines > 300} == {}
