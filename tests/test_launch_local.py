"""launch/local.py with small programs instead of train.py."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVER = """\
import sys
from pathlib import Path
from launch.local import main
sys.exit(main(sys.argv[3:], program=Path(sys.argv[1]), grace=float(sys.argv[2])))
"""
HEAD = """\
import argparse, os, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("coordinator", "process_id", "num_processes"):
    parser.add_argument(f"--{name}")
args, others = parser.parse_known_args()
me = int(args.process_id)
"""


@pytest.fixture
def start(tmp_path):
    """start(program, ...) -> the launcher, running."""
    running = []

    def start(program, processes=2, arguments=(), grace=30):
        file = tmp_path / "program.py"
        file.write_text(HEAD + textwrap.dedent(program))
        command = [sys.executable, "-c", DRIVER, str(file), str(grace)]
        command += [f"--processes={processes}", "--", *arguments]
        pipe = subprocess.PIPE
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        running.append(launcher)
        return launcher

    yield start
    for launcher in running:
        launcher.kill()
        launcher.communicate()


def finish(launcher):
    out, err = launcher.communicate(timeout=60)
    return launcher.returncode, sorted(out.splitlines()), sorted(err.splitlines())


@pytest.mark.parametrize("platforms", [None, "cuda"])
def test_each_process_gets_its_flags_and_no_accelerator_unless_named(platforms, start, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    program = """
    print(args.coordinator, args.num_processes, *others, os.environ["JAX_PLATFORMS"])
    print("no end of line", end="", file=sys.stderr)
    """
    status, out, err = finish(start(program, 3, ["--config=a.py:b=c", "--mode", "two words"]))
    address = out[0].split()[1]
    host, port = address.split(":")
    assert host == "localhost"
    assert 1024 <= int(port) < 2**16
    said = f"{address} 3 --config=a.py:b=c --mode two words {platforms or 'cpu'}"
    assert out == [f"[{i}] {said}" for i in range(3)]
    assert err == [f"[{i}] no end of line" for i in range(3)]
    assert status == 0


def test_a_process_that_fails_ends_the_others(start):
    began = time.monotonic()
    program = """
    if me == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    def told(signum, frame):
        print("told", signum, flush=True)
        if me == 0:
            sys.exit(7)  # not the first
    signal.signal(signal.SIGTERM, told)
    while True:
        time.sleep(60)  # until it is killed
    """
    status, out, _ = finish(start(program, 3, grace=1))
    assert status == 128 + signal.SIGKILL
    assert out == ["[0] told 15", "[2] told 15"]
    assert time.monotonic() - began < 30


def test_each_process_gets_each_signal_once(start):
    program = """
    count = 0
    def told(signum, frame):
        global count
        count += 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, told)
    print("up", flush=True)
    while not count:
        time.sleep(0.01)
    time.sleep(0.3 * me)  # the first to end must not cut the other short
    print("saved", count, flush=True)
    sys.exit(130 + me)
    """
    launcher = start(program)
    up = sorted(launcher.stdout.readline() for _ in range(2))
    assert up == ["[0] up\n", "[1] up\n"]
    launcher.send_signal(signal.SIGTERM)
    status, out, _ = finish(launcher)
    assert out == ["[0] saved 1", "[1] saved 1"]
    assert status == 130
