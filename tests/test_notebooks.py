"""The notebooks: each .ipynb is its .py with outputs that are complete and name no machine."""

import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
import pytest

from notebooks.execute import GALLERY, NAMES, pictures

PROJECT = Path(__file__).parents[1]
TRUE = {  # what an execution says on any machine
    "rezero_in_ten_minutes": [
        "the block is the identity, bit for bit: True",
        "|dL/dF| = 0.000000",
        "1,000 layers are the identity: True",
    ],
    "from_a_config_to_a_result": [
        'did you mean "optim.learning_rate"?',
        "logged losses, largest difference 0.0",
        '"status": "finished"',
    ],
    "inside_a_deep_transformer": ["ReZero, 64 layers: smallest 1.0, largest 1.0"],
    "three_rules_compared": ["plain loses in every seed: True"],
}


def read(path):
    return nbformat.read(path, as_version=4).cells


def text_of(cells):
    """All that the cells put out, but for pictures."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    data = [value for o in outputs for kind, value in o.get("data", {}).items() if "text" in kind]
    return "".join([o.text for o in outputs if o.output_type == "stream"] + data)


def check_outputs(name, cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    for sentence in TRUE[name]:
        assert sentence in text_of(cells)


def test_none_is_left_out():
    assert {path.stem for path in (PROJECT / "notebooks").glob("*.ipynb")} == set(TRUE)


@pytest.mark.parametrize("name", TRUE)
def test_saved_notebook(name):
    path = PROJECT / "notebooks" / f"{name}.ipynb"
    cells = read(path)
    pair = jupytext.read(path.with_suffix(".py")).cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in pair]
    check_outputs(name, cells)
    assert path.stat().st_size < 300_000
    paths = r"(?:/home|/root|/Users|/tmp|/var|/opt|/work|/mnt|/content)/\S*|[A-Z]:\\\S*"
    assert not re.findall(paths, text_of(cells) + "".join(cell.source for cell in cells))


def test_the_gallery_has_the_pictures_of_the_notebooks():
    page = (GALLERY.parent / "gallery.md").read_text()
    expected = {file: png for name in NAMES for file, png in pictures(name).items()}
    assert {path.name: path.read_bytes() for path in GALLERY.iterdir()} == expected
    assert set(re.findall(r"\(gallery/(.+?)\)", page)) == set(expected)
    assert max(map(len, expected.values())) < 60_000
    for name in NAMES:
        assert any(file.startswith(name) for file in expected)
        assert page.count(f"notebooks/{name}.ipynb)") == 2  # on GitHub and in Colab


@pytest.mark.parametrize("is_old", [False, True])
def test_colab_keeps_its_jax_unless_it_is_too_old(is_old, monkeypatch, tmp_path):
    jax = "jax>=99" if is_old else "jax>=0.1"
    needs = [jax, "numpy>=1", "scikit-learn>=99", "not_there>=1,<2", "ml-collections>=1"]
    (tmp_path / "requirements.txt").write_text("\n".join(needs) + "\n")
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    runpy.run_path(str(PROJECT / "notebooks" / "colab.py"), run_name="__main__")
    kept = [f"{name}=={version(name)}" for name in ("jax", "jaxlib")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert commands == [[*pip, *([jax] if is_old else kept), "scikit-learn>=99", "not_there<2,>=1"]]


@pytest.mark.campaign
@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE)
def test_executes_from_top_to_bottom(name, tmp_path):
    execute = [sys.executable, PROJECT / "notebooks" / "execute.py", name, "--out", tmp_path]
    subprocess.run(execute, check=True)
    check_outputs(name, read(tmp_path / f"{name}.ipynb"))
