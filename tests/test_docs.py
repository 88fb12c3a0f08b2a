"""README and docs: the Python runs, the commands parse, and named files, fields and links exist."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import rezero_jax
from experiments.claims import STATUSES
from rezero_jax.config import base_config, flatten, load_config

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
PLACEHOLDERS = {
    "RULE": "rezero",
    "SEED": "1",
    "DIR": "runs/dir",
    "FILE": "configs/mlp.py",
    "NAME": "toy",
    "DEPTH": "20",
    "LR": "0.1",
    "EPOCHS": "2",
    "HOST": "localhost",
    "PORT": "8476",
    "N": "2",
    "I": "1",
}


def read(name):
    return (ROOT / name).read_text()


def blocks(page, *languages):
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)
    assert all(language for language, _ in found), f"{page} has a block without a language"
    return [text for language, text in found if language in languages]


def commands(page):
    """The commands in the shell blocks of a page, split into words, with placeholders filled in."""
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            filled = re.sub(r"\b[A-Z]+\b", lambda m: PLACEHOLDERS.get(m[0], m[0]), line)
            if words := shlex.split(filled, comments=True):
                yield words


class Accepted(Exception):
    """A parser accepted the arguments of a command, which is not run."""


def accepts(main, program, arguments, monkeypatch):
    """Checks that the parser of a command accepts these arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self, args=None, namespace=None):
        self.allow_abbrev = False  # an abbreviation is a typo
        parse(self, args, namespace)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Accepted):
        main(arguments) if inspect.signature(main).parameters else main()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def script(path):
    """The module of a Python file outside packages."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def make_targets():
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))


@cache
def extras():
    return set(pyproject()["tool"]["setuptools"]["dynamic"]["optional-dependencies"])


@cache
def pyproject():
    return tomllib.loads(read("pyproject.toml"))


def check_train(arguments, monkeypatch):
    accepts(script("train.py").main, "train.py", arguments, monkeypatch)
    [config] = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    load_config(config, [a.removeprefix("--config.") for a in arguments if "--config." in a])


def check_python(arguments, monkeypatch):
    if arguments[0] == "-m" and arguments[1] == "venv":
        return
    if arguments[0] == "-m":
        name, *arguments = arguments[1:]
        if name == "pytest":
            return
        spec = importlib.util.find_spec(name)
        package = spec.submodule_search_locations is not None
        main = importlib.import_module(f"{name}.__main__" if package else name).main
        return accepts(main, name, arguments, monkeypatch)
    path, *arguments = arguments
    if path == "train.py":
        return check_train(arguments, monkeypatch)
    if "--" in arguments:  # the rest is a command of train.py
        check_train(arguments[arguments.index("--") + 1 :], monkeypatch)
    accepts(script(path).main, path, arguments, monkeypatch)


def check_pip(arguments):
    assert arguments[0] == "install"
    for option, target in pairwise(arguments):
        if option == "-r":
            assert (ROOT / target).is_file()
        elif target not in ("-r", "-e", "jax[cuda13]", "jax[tpu]"):
            wanted = re.fullmatch(r"\.(?:\[(\w+)\])?", target)[1]
            assert wanted is None or wanted in extras()


ELSEWHERE = ("export", "gcloud", "kubectl", "sbatch", "sky")  # other projects' programs


def check_elsewhere(arguments, monkeypatch):
    for argument in arguments:
        if argument.startswith("launch/"):
            assert (ROOT / argument).is_file()
        _, is_train, train = argument.partition(" train.py ")
        if is_train:  # a host executes this command
            check_train(shlex.split(train), monkeypatch)


def check(words, monkeypatch):
    """Raises an error unless this project has the command."""
    while words[0] == "srun" or words[0].startswith("-"):
        words = words[1:]
    program, *arguments = words
    if program in ("python", "python3", ".venv/bin/python"):
        check_python(arguments, monkeypatch)
    elif Path(program).name == "pip":
        check_pip(arguments)
    elif program in ELSEWHERE:
        check_elsewhere(arguments, monkeypatch)
    elif program == "make":
        assert arguments
        assert {one for one in arguments if "=" not in one} <= make_targets()
    else:
        assert words == [".ci/run"]


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run_in_order(page):
    exec("\n".join(blocks(page, "python")), {})


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_compile_and_their_imports_exist(page):
    code = ast.parse("\n".join(blocks(page, "python")))
    imports = [node for node in ast.walk(code) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    exec(compile(ast.Module(imports, []), page, "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(page))
    assert found or page in ("docs/index.md", "docs/models.md", "docs/schemes.md")
    for words in found:
        check(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --config=configs/mlp.py:dept=64 --workdir=a",
        "python train.py --config=configs/mlp.py --workdir=a --config.optim.rate=1",
        "python train.py --config=configs/mlp.py --workdri=a",
        "python sample.py --workdir=a --promt=b",
        "python launch/local.py --processes=2 -- --config=configs/mpl.py --workdir=a",
        "python launch/lokal.py --processes=2 -- --config=configs/mlp.py --workdir=a",
        "python -m rezero_jax.analysis.table runs/a --epoch 1",
        "python -m rezero_jax.analysis.tables runs/a",
        "python -m experiments toy --scales=cpu",
        "python -m benchmarks.updates --pairs 3",
        "pip install .[trains]",
        "pip install -r requirement.txt",
        "make trian",
        "sbatch launch/slrum.sh",
        "gcloud ssh --command='cd a && python train.py --config=configs/mpl.py --workdir=b'",
        "tensorbord --logdir runs",
    ],
)
def test_a_typo_in_a_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(command), monkeypatch)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.relative_to(ROOT)), target


def paths_and_names(page):
    """Texts between single backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_modules_and_fields_that_are_named_exist(page):
    config = flatten(base_config().to_dict())
    for file in (ROOT / "configs").glob("[a-z]*.py"):
        config |= flatten(load_config(str(file)).to_dict())
    fields = set(config) | {key.rpartition(".")[0] for key in config}
    for text in paths_and_names(page):
        if re.fullmatch(r"[\w/]+\.(py|ipynb|csv|txt|toml|yaml|sh)", text) and "/" in text:
            assert (ROOT / text).is_file(), text
        elif re.fullmatch(r"rezero_jax(\.\w+)+", text):
            assert importlib.util.find_spec(text), text
        elif field := re.fullmatch(
            r"((?:model|data|train|eval|optim|mesh)\.(?!py)[\w.]+)(=.*)?", text
        ):
            assert field[1] in fields, text


def test_readme_is_one_page_with_its_picture_on_the_first_screen():
    lines = read("README.md").splitlines()
    assert len(lines) <= 200
    pictures = [
        number for number, line in enumerate(lines) if re.search(r"\]\(docs/.+\.png\)", line)
    ]
    assert min(pictures) < 25


def table(page, heading):
    """The cells of the first table below a heading, without its head."""
    text = read(page).split(f"\n{heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", text, flags=re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("page", "heading"),
    [("docs/results.md", "## For a reader in a hurry"), ("README.md", "## Six findings")],
)
def test_each_claim_has_a_status_n_an_interval_and_an_experiment(page, heading):
    rows = table(page, heading)
    assert len(rows) > 20 or (len(rows) == 6 and page == "README.md")
    for claim, status, n, interval, evidence, experiment in rows:
        assert status in STATUSES, claim
        assert int(n.replace(",", "")) > 0
        assert interval
        assert evidence
        assert re.fullmatch(r"`\w+`", experiment)
        # An interval, an exact result or many draws: nothing else replicates or contradicts.
        if n == "1" and "exact" not in evidence:
            assert status in ("not tested", "not significant"), claim


@pytest.mark.slow
@pytest.mark.parametrize("link", ["", "[a](models.md#nothing)", "[a](/models.md)"])
def test_make_docs_fails_for_a_broken_link(link, tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write(link)
    [arguments] = re.findall(r"mkdocs (build.*)", read("Makefile"))
    command = [sys.executable, "-m", "mkdocs", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == bool(link), done.stderr


def requirements(name):
    return read(name).split()


def test_each_requirement_has_one_version():
    stated = {}
    files = ["requirements.txt", "requirements-analysis.txt", "requirements-dev.txt"]
    lines = [line for file in files for line in requirements(file)]
    for line in lines + pyproject()["project"]["dependencies"]:
        assert stated.setdefault(Requirement(line).name, line) == line
    core = set(pyproject()["project"]["dependencies"])
    assert core | set(requirements("requirements-analysis.txt")) <= set(
        requirements("requirements.txt")
    )


def test_pre_commit_has_the_ruff_of_the_development_requirements():
    [ruff] = [line for line in requirements("requirements-dev.txt") if line.startswith("ruff")]
    [local] = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [hook["additional_dependencies"] for hook in local["hooks"]] == [[ruff], [ruff]]


def test_the_citation_names_the_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["url"] == "https://arxiv.org/abs/2003.04887"
    assert len(paper["authors"]) == 5
    assert citation["license"] == pyproject()["project"]["license"] == "Apache-2.0"


def test_the_changelog_has_this_version():
    assert f"## {rezero_jax.__version__}" in read("CHANGELOG.md")
