"""Signals: they end a starting program at once, a training run saves first, a library has none."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.interrupt import StopSignal
from rezero_jax.config import load_config
from rezero_jax.training.loop import Interrupted, train
from tests.families import ROOT

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


def test_ctrl_c_while_it_starts(tmp_path):
    argv = [f"--workdir={tmp_path / 'run'}", f"--config={ROOT / 'configs/mlp.py'}"]
    argv += ["--config.train.epochs=100000"]
    command = [sys.executable, "-c", START, str(ROOT / "train.py"), *argv]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "installed\n"
            time.sleep(0.4)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "\ntrain.py: stopped\n")


def test_no_heavy_import_precedes_the_handler():
    code = (
        "import sys, runpy; old = set(sys.modules); import launch.interrupt as i\n"
        "def stop(program): print(*sorted(set(sys.modules) - old)); raise SystemExit\n"
        "i.end_on_interrupt = stop; runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    for program in ("train.py", "sample.py"):
        command = [sys.executable, "-c", code, str(ROOT / program)]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert {"jax", "numpy", "ml_collections", "etils"}.isdisjoint(out.split())


def test_only_stop_signal_replaces_handlers(tmp_path):
    fields = ["train.epochs=None", "train.steps=9", "train.steps_per_dispatch=1", "mesh.data=1"]
    config = load_config("configs/mlp.py:smoke", fields)
    signals = (signal.SIGINT, signal.SIGTERM)
    before, seen = [signal.getsignal(signum) for signum in signals], []

    def stop():
        seen.append([signal.getsignal(signum) for signum in signals])
        return signal.SIGTERM

    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(Interrupted) as info:
            thread.submit(train, config, tmp_path, stop=stop).result()
        assert info.value.signum == signal.SIGTERM
        assert thread.submit(train, config, tmp_path).result()["steps"] == 9
    assert set(map(tuple, seen)) == {tuple(before)}
    with StopSignal("test") as stop:
        assert stop() == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before[1]


@pytest.mark.parametrize(("begin", "words"), [("", "test: stopped"), ("stop()", "second signal")])
def test_a_signal_before_the_run_and_a_second_one_end_the_process(begin, words):
    code = (
        "import signal; from launch.interrupt import StopSignal\n"
        f"with StopSignal('test') as stop:\n {begin}\n"
        " for _ in range(2): signal.raise_signal(signal.SIGTERM)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 128 + signal.SIGTERM
    assert words in run.stderr


def test_a_terminal_that_is_closed_does_not_stop_a_run():
    before = signal.getsignal(signal.SIGHUP)
    with StopSignal("train.py") as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop() == 0
    assert signal.getsignal(signal.SIGHUP) == before
