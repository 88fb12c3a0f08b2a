"""Ctrl-C while a program starts: one sentence and status 130, whatever it is importing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Tells when the handler is in force; what comes before is Python's own start.
START = """\
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run unattended
import launch.interrupt
install = launch.interrupt.end_on_interrupt
def installed(program):
    install(program)
    print("installed", flush=True)
launch.interrupt.end_on_interrupt = installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4, 0.8])
@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_ctrl_c_while_it_starts(program, delay, tmp_path):
    argv = [f"--workdir={tmp_path / 'run'}"]
    if program == "train.py":
        argv += [f"--config={ROOT / 'configs/mlp.py'}", "--config.train.epochs=100000"]
    with subprocess.Popen(
        [sys.executable, "-c", START, str(ROOT / program), *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "installed\n"
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, f"\n{program}: stopped\n")


def test_no_heavy_import_precedes_the_handler():
    code = (
        "import sys, runpy; old = set(sys.modules); import launch.interrupt as i\n"
        "def stop(program): print(*sorted(set(sys.modules) - old)); raise SystemExit\n"
        "i.end_on_interrupt = stop; runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    for program in ("train.py", "sample.py"):
        command = [sys.executable, "-c", code, str(ROOT / program)]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert {"jax", "numpy", "rezero_jax", "argparse"}.isdisjoint(out.split())
