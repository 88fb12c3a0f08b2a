"""Imports point one way, files are short, and every guarantee has a fast test."""

import ast
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


# The lines of read paths and folders, and a few more, so that growth is a decision:
# whoever raises a number says in the commit what the lines are worth.
LIMITS = {"MLP": 3620, "Transformer": 4730, "rezero_jax": 13_140, "experiments": 4950}
LIMITS |= {"benchmarks rehearsal": 3450, "tests": 16_900}
FILES = 87  # of the package


def test_growth_is_a_decision():
    lines = {name: sum(map(size.lines_of, paths)) for name, paths in size.READ_PATHS.items()}
    for name in LIMITS.keys() - lines.keys():
        lines[name] = sum(size.tracked(*name.split()).values())
    assert {name: n for name, n in lines.items() if n > LIMITS[name]} == {}
    assert len(size.tracked("rezero_jax")) <= FILES


@pytest.mark.slow
@pytest.mark.parametrize(("family", "most"), [("MLP", 9), ("Transformer", 12)])
def test_few_frames_are_between_the_step_and_the_residual_add(family, most):
    assert len(size.frames(family)) <= most


class Collected:
    """The fast tests that hold a guarantee, as pairs of its name and the test's."""

    def pytest_collection_finish(self, session):
        markers = [(item, *item.iter_markers("guarantee")) for item in session.items]
        self.pairs = [(mark.args[0], item.nodeid) for item, *marks in markers for mark in marks]


def test_every_guarantee_has_a_fast_test(capsys):
    paths = (ROOT / "tests").glob("test_*.py")
    files = [str(path) for path in paths if "guarantee(" in path.read_text()]
    options = ["--collect-only", "-q", "-m", "guarantee and not slow", "-p", "no:cacheprovider"]
    collected = Collected()
    assert pytest.main([*options, *files], [collected]) == 0, capsys.readouterr().out
    assert {name for name, _ in collected.pairs} == GUARANTEES.keys()
    found = {name: " ".join(t for n, t in collected.pairs if n == name) for name in GUARANTEES}
    wanted = ((name, word) for name, words in GUARANTEES.items() for word in words)
    assert [(name, word) for name, word in wanted if word not in found[name]] == []
