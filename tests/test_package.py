"""What others get by `pip install .`: the package alone, its types, and no more than it needs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "orbax.checkpoint ml_collections tensorflow_datasets grain array_record sklearn PIL "
    "tensorboardX matplotlib tqdm"
)
USE = """\
import jax.numpy as jnp
from flax import nnx

from rezero_jax import MLP, ReZero

model = MLP(in_features=4, width=8, depth=2, out_features=3, rngs=nnx.Rngs(0))
block = ReZero(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), alpha_init=0.0)
"""
MISUSE = 'ReZero(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), alpha_init="open")\nMLP(4, 8, 2, 3)\n'


def run(*command, cwd):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_importing_imports_nothing_that_only_training_needs(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rezero_jax.residual;"
        "print(len([name for name in sys.modules if name.startswith('rezero_jax')]));"
        "import rezero_jax, rezero_jax.models.weights;"
        "[getattr(rezero_jax, name) for name in rezero_jax.__all__ if name != 'open_run'];"
        f"print([name for name in {OPTIONAL!r}.split() if name in sys.modules]);"
        "from rezero_jax import *; print(set(rezero_jax.__all__) <= set(globals()))"
    )
    status, output = run(sys.executable, "-c", code, cwd=tmp_path)
    assert status == 0, output
    files, optional, complete = output.splitlines()
    assert int(files) <= 8  # the rules load no other part of the package
    assert (complete, optional) == ("True", "[]")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of a new environment that has the wheel and what it needs, and the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "source").mkdir()
    for name in ("rezero_jax", "experiments", "tests"):
        shutil.copytree(ROOT / name, folder / "source" / name)
    for path in [*ROOT.glob("*.t*"), *ROOT.glob("*.py"), ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(path, folder / "source")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    status, output = run(*wheel, folder / "source", cwd=folder)
    assert status == 0, output
    [wheel] = folder.glob("*.whl")
    assert run(sys.executable, "-m", "venv", folder / "env", cwd=folder)[0] == 0
    python = folder / "env" / "bin" / "python"
    status, output = run(python, "-m", "pip", "install", "--quiet", wheel, "mypy", cwd=folder)
    assert status == 0, output
    return python, wheel


@pytest.mark.campaign
@pytest.mark.slow
def test_the_wheel_has_the_package_alone_and_is_enough_for_the_models(installed, tmp_path):
    python, wheel = installed
    names = zipfile.ZipFile(wheel).namelist()
    assert "rezero_jax/py.typed" in names
    assert {Path(name).parts[0].partition("-")[0] for name in names} == {"rezero_jax"}
    assert not [name for name in names if name.endswith((".csv", ".npz"))]
    assert any(name.endswith("LICENSE") for name in names)
    code = USE + "print(block(jnp.ones((2, 4))).shape, model(jnp.ones((2, 4))).shape)"
    assert run(python, "-c", code, cwd=tmp_path) == (0, "(2, 4) (2, 3)\n")
    assert run(python, "-c", "import tensorflow_datasets", cwd=tmp_path)[0] == 1
    # Type checkers of others see the types.
    (tmp_path / "right.py").write_text(USE)
    (tmp_path / "wrong.py").write_text(USE + MISUSE)
    mypy = [python, "-m", "mypy", "--no-incremental"]
    assert run(*mypy, "right.py", cwd=tmp_path)[0] == 0
    status, output = run(*mypy, "wrong.py", cwd=tmp_path)
    assert status == 1
    assert 'Argument "alpha_init" to "ReZero" has incompatible type "str"' in output
    assert 'Missing named argument "rngs" for "MLP"' in output
    # The extra `analysis` is enough for plots and tables.
    assert run(python, "-m", "pip", "install", "-q", f"{wheel}[analysis]", cwd=tmp_path)[0] == 0
    code = "import rezero_jax.analysis.plots, rezero_jax.analysis.table"
    assert run(python, "-c", code, cwd=tmp_path) == (0, "")
