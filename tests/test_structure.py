"""Imports point one way, files are short, and every guarantee has a fast test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import size

ROOT = Path(__file__).parents[1]
# From the ground up: a file imports from its own line or the lines above.
LAYERS = (
    ("rezero_jax.errors", "rezero_jax.formatting"),
    ("rezero_jax.command", "rezero_jax.user_code"),
    ("rezero_jax.config", "rezero_jax.devices", "rezero_jax.processes", "rezero_jax.residual"),
    ("rezero_jax.stack",),
    ("rezero_jax.parameters",),
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
SOURCES = [
    path
    for top in ("rezero_jax", "configs", "launch", "experiments", "benchmarks", "rehearsal")
    for path in sorted((ROOT / top).rglob("*.py"))
] + [ROOT / "train.py", ROOT / "sample.py"]
# Each guarantee of the project, and what the names of its fast tests contain between them.
GUARANTEES = {
    "resume": ("[mlp]", "[resnet]", "[transformer]", "[vit]"),
    "SIGTERM": ("",),
    "SIGKILL": ("",),
    "damaged checkpoint": ("",),
    "one start": ("second", "newest"),
    "bucket": ("bits", "older", "commit"),
    "PyTorch parity": ("test_mlp", "test_resnet", "test_layers", "test_vit"),
    "sharding": (
        *("mlp-data 4", "mlp-full 4 x model 2", "resnet-data 4", "resnet-full 4"),
        *("transformer-data 4", "transformer-full 4 x model 2"),
    ),
    "identity at init": ("[mlp]", "[resnet]", "[transformer]", "[vit]"),
    "gradient contract": ("[mlp]", "[resnet]", "[transformer]", "[vit]"),
    "causality": ("",),
    "scanned equals unrolled": ("[mlp]", "[resnet]", "[transformer]", "[vit]"),
    "optimised": ("[mlp]", "[resnet]", "[transformer]", "[vit]"),
    "bad input": ("",),
    "data order": ("",),
    "optimizer groups": ("",),
    "step": ("",),
    "run folder": ("",),
}


def unit_of(module):
    """The longest name of LAYERS that the module is or is in; None for other people's modules."""
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


def test_imports_point_one_way():
    wrong = []
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        here = unit_of(module)
        if here is None:
            assert module == "rezero_jax.__init__"  # the package's face may import all models
            continue
        for target in filter(None, map(unit_of, imports_of(path))):
            if FLOOR[target] > FLOOR[here] or (here, target) in APART:
                wrong.append(f"{module} imports {target}")
    assert wrong == []


def test_no_file_is_too_long_to_read_in_one_sitting():
    lengths = {str(path.relative_to(ROOT)): size.lines_of(path) for path in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > 330} == {}


def test_few_files_are_short():
    assert len(size.short(size.tracked("rezero_jax"))) <= 10


@pytest.mark.slow
@pytest.mark.parametrize(("family", "most"), [("MLP", 9), ("Transformer", 12)])
def test_few_frames_are_between_the_step_and_the_residual_add(family, most):
    assert len(size.frames(family)) <= most


def test_read_paths_list_files_that_exist():
    for family in size.READ_PATHS:
        assert all(map(size.lines_of, size.READ_PATHS[family]))


def test_every_guarantee_has_a_fast_test():
    files = [
        path for path in (ROOT / "tests").glob("test_*.py") if "guarantee(" in path.read_text()
    ]
    command = [sys.executable, "-c", COLLECT, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = dict.fromkeys(GUARANTEES, "")
    for line in done.stdout.splitlines():
        if line.startswith("guarantee\t"):
            _, name, test = line.split("\t")
            found[name] += f" {test}"  # a KeyError names a guarantee that GUARANTEES lacks
    missing = [
        f"{name}: {word}" if tests else name
        for name, tests in found.items()
        for word in GUARANTEES[name]
        if not tests or word not in tests
    ]
    assert missing == [], done.stdout + done.stderr


COLLECT = """
import sys, pytest

class Guarantees:
    def pytest_collection_finish(self, session):
        for item in session.items:
            for marker in item.iter_markers("guarantee"):
                print("guarantee", *marker.args, item.nodeid, sep="\\t")

options = ["--collect-only", "-q", "-m", "guarantee and not slow", "-p", "no:cacheprovider"]
pytest.main([*options, *sys.argv[1:]], [Guarantees()])
"""
