"""README and docs: the Python runs, the commands parse, and named files, fields and links exist."""

import argparse
import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import rezero_jax
from experiments.published import STATUSES
from rezero_jax.config import base_config, flatten, load_config, override

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
PLACEHOLDERS = {"RULE": "rezero", "SEED": "1", "DIR": "runs/dir", "FILE": "configs/mlp.py"}
PLACEHOLDERS |= {"NAME": "toy", "DEPTH": "20", "LR": "0.1", "EPOCHS": "2"}
PLACEHOLDERS |= {"HOST": "localhost", "PORT": "8476", "N": "2", "I": "1"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
ELSEWHERE = ("export", "gcloud", "git", "kubectl", "sbatch", "sky")  # other projects' programs


def read(name):
    return (ROOT / name).read_text()


def blocks(page, wanted):
    """The fenced blocks of a page in a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)
    assert all(language for language, _ in found), f"{page} has a block without a language"
    return [text for language, text in found if language == wanted]


def prose(page):
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M)


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


def check_train(arguments, monkeypatch):
    accepts(script("train.py").main, "train.py", arguments, monkeypatch)
    overrides = [a.removeprefix("--config.") for a in arguments if "--config." in a]
    if "--mode=eval" in arguments:  # with the config of the run
        return override(base_config(), overrides)
    [config] = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    load_config(config, overrides)


def check_python(arguments, monkeypatch):
    if arguments[:2] in (["-m", "venv"], ["-m", "pytest"]):
        return
    if arguments[0] == "-m":
        name, *arguments = arguments[1:]
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
            extras = PYPROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
            assert wanted is None or wanted in extras


def check(words, monkeypatch):
    """Raises an error unless this project has the command."""
    while words[0] == "srun" or words[0].startswith("-"):
        words = words[1:]
    program, *arguments = words
    if program in ("python", "python3", ".venv/bin/python"):
        check_python(arguments, monkeypatch)
    elif Path(program).name == "pip":
        check_pip(arguments)
    elif program == "docker":
        check(words[words.index("python") :], monkeypatch)
    elif program in ELSEWHERE:
        for argument in arguments:
            assert not argument.startswith("launch/") or (ROOT / argument).is_file()
            _, is_train, train = argument.partition(" train.py ")
            if is_train:  # a host executes this command
                check_train(shlex.split(train), monkeypatch)
    elif program == "make":
        assert arguments
        assert {one for one in arguments if "=" not in one} <= MAKE_TARGETS
    else:
        assert words == [".ci/run"]


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run_in_order(page, monkeypatch, tmp_path):
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)  # some blocks write files
    exec("\n".join(blocks(page, "python")), {})


def test_python_blocks_compile_and_their_imports_exist():
    for page in PYTHON_PAGES:
        code = ast.parse("\n".join(blocks(page, "python")))
        imports = [node for node in ast.walk(code) if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page, "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        check(words, monkeypatch)


def test_a_typo_in_a_command_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in (
        "python train.py --config=configs/mlp.py:dept=64 --workdir=a",
        "python train.py --config=configs/mlp.py --workdir=a --config.optim.rate=1",
        "python sample.py --workdir=a --promt=b",
        "python launch/local.py --processes=2 -- --config=configs/mpl.py --workdir=a",
        "python -m rezero_jax.analysis.table runs/a --epoch 1",
        "pip install .[trains]",
        "make trian",
        "sbatch launch/slrum.sh",
        "gcloud ssh --command='cd a && python train.py --config=configs/mpl.py --workdir=b'",
        "tensorbord --logdir runs",
    ):
        with pytest.raises((Exception, SystemExit)):
            check(shlex.split(command), monkeypatch)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith(("https://", "../../actions/")):  # the latter on GitHub
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.relative_to(ROOT)), target


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_modules_and_fields_that_are_named_exist(page):
    config = flatten(base_config().to_dict())
    for file in (ROOT / "configs").glob("[a-z]*.py"):
        config |= flatten(load_config(str(file)).to_dict())
    fields = set(config) | {key.rpartition(".")[0] for key in config}
    for text in re.findall(r"`([^`\n]+)`", prose(page)):
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
    assert len(lines) <= 150
    assert re.search(r"\]\(docs/.+\.png\)", "".join(lines[:25]))


def public_objects():
    """The objects of the reference by name, in the order of the page."""
    named = re.findall(r"^::: (\S+)$", read("docs/reference.md"), re.M)
    parts = [name.rpartition(".") for name in named]
    return {name: getattr(importlib.import_module(module), name) for module, _, name in parts}


def test_the_reference_has_every_public_name_with_an_example():
    found = public_objects()
    assert set(found) >= set(rezero_jax.__all__)
    example = "Examples:\n  >>> "
    without = [name for name, one in found.items() if example not in inspect.getdoc(one)]
    # Two base classes, and what open_run returns.
    assert without == ["TransformerLayer", "LayerStack", "OpenRun"]


class AnyOutput(doctest.OutputChecker):
    """An example without an expected output may print anything."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.slow
def test_the_examples_of_the_reference_run_in_order(monkeypatch, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    scope, runner = {}, doctest.DocTestRunner(AnyOutput())
    exec("\n".join(blocks("docs/reference.md", "python")), scope)
    for name, one in public_objects().items():
        test = doctest.DocTestParser().get_doctest(one.__doc__, scope, name, None, None)
        runner.run(test, clear_globs=False)
        scope |= test.globs  # get_doctest copies it
    assert runner.failures == 0
    assert runner.tries > 60


def test_the_results_are_one_page_of_one_word_verdicts():
    text = read("docs/results.md")
    assert len(text.splitlines()) <= 150
    table = re.search(r"<!-- paper_claims -->\n(.*?)\n<!-- end -->", text, flags=re.S)[1]
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert 6 <= len(rows) <= 12
    for claim, *_, n, setting, verdict in rows:
        status = re.fullmatch(r"\[(.+)\]\(evidence\.md#.+\) \|", verdict)[1]
        assert status in STATUSES, claim
        assert (status == "not tested") == (setting != "same"), claim
        assert status == "not tested" or int(n.replace(",", "")) > 1, claim


def test_each_requirement_has_one_version():
    core = PYPROJECT["project"]["dependencies"]
    lines = {name: read(f"requirements{name}.txt").split() for name in ("", "-analysis", "-dev")}
    stated = {}
    for line in [*core, *lines[""], *lines["-analysis"], *lines["-dev"]]:
        assert stated.setdefault(Requirement(line).name, line) == line
    assert {*core, *lines["-analysis"]} <= set(lines[""])
    [local] = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [hook["additional_dependencies"] for hook in local["hooks"]] == [[stated["ruff"]]] * 2
