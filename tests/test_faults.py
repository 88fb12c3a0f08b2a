"""What a run says when it can no longer write, and that nothing saved is lost by it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.errors import JaxRuntimeError

from launch import flags
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop

ROOT = Path(__file__).parents[1]
COMMAND = [
    sys.executable,
    str(ROOT / "train.py"),
    f"--config={ROOT / 'configs/mlp.py'}:depth=2,width=256",
    "--config.train.epochs=None",
    "--config.train.steps=60",
    "--config.eval.every_epochs=None",
    "--config.checkpoint.every_steps=20",
    "--config.log.every_steps=5",
]


def run(workdir, *flags, kilobytes=None):
    """The command to its end; `kilobytes` is the largest file that it may write."""
    limit = ["bash", "-c", f'ulimit -f {kilobytes} && exec "$@"', "-"] if kilobytes else []
    return subprocess.run(
        [*limit, *COMMAND, f"--workdir={workdir}", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def assert_one_sentence(result):
    """Exit status 2, and one sentence that says what to do.

    TensorStore, not Python, may print a traceback before it for each array that it could not write.
    """
    said = [line for line in result.stderr.splitlines() if line.startswith("train.py:")]
    assert result.returncode == 2, result.stderr
    assert len(said) == 1
    assert result.stderr.endswith(said[0] + "\n")
    assert said[0].endswith("and the same command resumes from the newest checkpoint")


def params(workdir, step):
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(workdir / "checkpoints" / str(step) / "state")
    return state["params"]


def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path):
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert run(whole).returncode == 0
    shutil.copytree(whole, full)
    (full / "final.json").unlink()
    for step in (40, 60):
        shutil.rmtree(full / "checkpoints" / str(step))
    result = run(full, kilobytes=100)
    assert_one_sentence(result)
    assert "and ulimit -f allows files of 0.1 MB" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (full / "checkpoints").iterdir() if path.name.isdigit()] == ["20"]
    assert not (full / "final.json").exists()
    assert run(full).returncode == 0
    jax.tree.map(np.testing.assert_array_equal, params(whole, 60), params(full, 60))


def test_a_disk_without_room_is_told_before_it_is_full(tmp_path, monkeypatch):
    config = load_config(
        str(ROOT / "configs/mlp.py") + ":smoke", ["checkpoint.every_steps=20", "mesh.data=1"]
    )
    found = shutil.disk_usage(tmp_path)
    free = iter([found.free, 100])  # at the second save

    def usage(folder):
        assert Path(folder).is_relative_to(tmp_path)
        return found._replace(free=next(free))

    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(UserError, match=r"\(a checkpoint needs 0\.0 MB and 0\.0 MB are free\)"):
        loop.train(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["20"]


def test_a_process_lost_while_saving_is_no_failed_write(tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise JaxRuntimeError("Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    config = load_config(f"{ROOT / 'configs/mlp.py'}:smoke", ["mesh.data=1", "train.epochs=0.1"])
    with pytest.raises(JaxRuntimeError, match="closed by peer"):
        loop.train(config, tmp_path)


def test_a_workdir_that_vanishes_is_told(tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}", "--config.train.steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None:
            if (workdir / "checkpoints" / "20").exists():
                # Stopped meanwhile, lest it makes the folder again before the file is there.
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                workdir.rename(tmp_path / "elsewhere")
                workdir.write_text("")  # no folder, nor can there be one
                process.send_signal(signal.SIGCONT)
                break
            time.sleep(0.01)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert_one_sentence(subprocess.CompletedProcess(COMMAND, process.returncode, "", err))
    assert (tmp_path / "elsewhere" / "checkpoints" / "20").is_dir()
    assert read_metrics(tmp_path / "elsewhere")


def test_a_trace_of_some_updates(tmp_path):
    assert run(tmp_path, "--profile_steps=31:33").returncode == 0
    names = [path.name for path in (tmp_path / "profile").rglob("*")]
    assert "perfetto_trace.json.gz" in names
    assert any(name.endswith(".xplane.pb") for name in names)
    assert json.loads((tmp_path / "final.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("now", "last", "expected"),
    [(0, 9, False), (5, 10, True), (15, 25, True), (20, 30, False), (40, 50, False)],
)
def test_a_trace_begins_with_the_dispatch_of_its_first_update(
    now, last, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: None)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: None)
    said = []
    profile = loop.Profile(tmp_path, (10, 20), 0, said.append)
    profile.begin(now, last)
    profile.end(last, None)
    assert bool(said) == (expected and last >= 20)
    profile.close()
    assert bool(said) == expected


@pytest.mark.parametrize("steps", [(50, 70), (61, 61)])
def test_a_trace_beyond_the_end_is_refused(steps, tmp_path):
    config = load_config(
        str(ROOT / "configs/mlp.py") + ":smoke",
        ["train.epochs=None", "train.steps=60", "mesh.data=1"],
    )
    with pytest.raises(UserError, match=r"beyond the last step .* two numbers from 1 to 60"):
        loop.train(config, tmp_path / "run", profile=steps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "10", "20:10", "0:5", "a:b", "1:2:3"])
def test_a_range_that_is_none(text, capsys):
    with pytest.raises(SystemExit):
        flags.parse(["--config=a.py", "--workdir=b", f"--profile_steps={text}"])
    assert "FIRST:LAST" in capsys.readouterr().err
