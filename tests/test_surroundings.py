"""What surrounds a program, and may be missing: streams, the user, folders and devices."""

import itertools
import os
import re
import signal
import subprocess
import sys

import pytest

from rezero_jax import devices
from rezero_jax.errors import UserError
from rezero_jax.runs.files import path_of
from rezero_jax.training import loop
from tests.families import ROOT, TINY, config

PRINTER = """\
import sys
from rezero_jax import command
def work():
    print("\\u00e9" * 100_000)
command.run(lambda: command.exit_status("printer", work))
"""
LASTING = """\
import sys
from rezero_jax import command
command.open_streams(lasting=True)
for _ in range(100):
    print("\\u00e9" * 10_000)
    print("\\u00e9", file=sys.stderr)
with open(sys.argv[1], "w") as file:  # has no number of a standard stream, where libraries write
    print(file.fileno() > 2, file=file)
"""


def shell(code, redirection, *arguments, **variables):
    """Exit status of Python, stdout and stderr of the shell."""
    line = f'"$0" "$@" {redirection}; status=${{PIPESTATUS[0]}}; exec 1>&2; exit $status'
    run = subprocess.run(
        ["bash", "-c", line, sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
    )
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize(
    ("redirection", "variables", "status", "out", "err"),
    [
        ("| head -c 4", {}, 141, "éé".encode(), b""),
        ("> /dev/full", {}, 2, b"", b"printer: cannot use the output (No space left on device)\n"),
        ("<&- >&- 2>&-", {}, 0, b"", b""),
        ("| head -c 4", {"PYTHONIOENCODING": "ascii"}, 141, b"????", b""),
    ],
)
def test_output_of_a_program(redirection, variables, status, out, err):
    assert shell(PRINTER, redirection, **variables) == (status, out, err)


@pytest.mark.parametrize("redirection", ["| head -c 4", "> /dev/full 2> /dev/full", "<&- >&- 2>&-"])
def test_a_run_outlives_its_terminal(redirection, tmp_path):
    assert shell(LASTING, redirection, tmp_path / "file")[0] == 0
    assert (tmp_path / "file").read_text() == "True\n"


def test_every_program_prepares_its_streams():
    files = [ROOT / "train.py", ROOT / "sample.py"]
    for folder in ("rezero_jax", "experiments", "rehearsal", "launch", "benchmarks"):
        files += sorted((ROOT / folder).rglob("*.py"))
    programs = {file.stem: file.read_text() for file in files}
    programs = {name: text for name, text in programs.items() if "if __name__ ==" in text}
    # They only write for another program.
    for name in ("accelerator", "jax_worker", "torch_worker", "notebook_start"):
        programs.pop(name, None)
    assert len(programs) > 8
    for name, text in programs.items():
        assert re.search(r"\brun\(main|open_streams\(", text), name


def test_a_user_without_an_entry_or_a_home_trains_and_resumes(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    for name in ("pwd.getpwuid", "grp.getgrgid"):
        monkeypatch.setattr(name, {}.__getitem__)
    signals = itertools.chain([0], itertools.repeat(signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
        loop.train(config("mlp.py:smoke", **TINY), tmp_path, stop=lambda: next(signals))
    assert loop.train(config("mlp.py:smoke", **TINY), tmp_path)["steps"] == TINY["train.steps"]


def test_what_is_missing_around_a_run_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not UTF-8; name another"):
        path_of(os.fsdecode(b"runs/\xff"))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the current folder was deleted"):
        path_of("runs")
    assert path_of(tmp_path).exists()
    monkeypatch.chdir(tmp_path)
    for error in (AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")):

        def fail(error=error):
            raise error

        monkeypatch.setattr(devices.jax, "devices", fail)
        with pytest.raises(UserError, match="JAX finds no device for JAX_PLATFORMS=cpu"):
            devices.check_platform()
