"""A run that can no longer write says so in one sentence, and loses nothing that was saved."""

import json
import shutil
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from jax.errors import JaxRuntimeError

from launch import flags
from rezero_jax import processes
from rezero_jax.errors import UserError
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from tests.families import FAMILIES, STEPS, command, run
from tests.faults.compare import changed_arrays, saved

MLP = FAMILIES["mlp"]
CONFIG = MLP.load_config()


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_same_command_resumes(tmp_path):
    whole, full = tmp_path / "whole", tmp_path / "full"
    fields = {"train.epochs": None, "train.steps": 60, "checkpoint.every_steps": 20}
    assert run(command("mlp.py:depth=2,width=256", whole, **fields)).returncode == 0
    shutil.copytree(whole, full)
    (full / "final.json").unlink()
    for step in (40, 60):
        shutil.rmtree(full / "checkpoints" / str(step))
    argv = command("mlp.py:depth=2,width=256", full, **fields)
    result = run(["bash", "-c", 'ulimit -f 100 && exec "$@"', "-", *argv])
    assert result.returncode == 2
    (said,) = (line for line in result.stderr.splitlines() if line.startswith("train.py:"))
    assert "cannot write to the workdir" in said
    assert "the same command resumes" in said
    assert [path.name for path in (full / "checkpoints").iterdir() if path.name.isdigit()] == ["20"]
    assert not (full / "final.json").exists()
    assert run(argv).returncode == 0
    assert changed_arrays(saved(whole, 60), saved(full, 60)) == []


def test_a_disk_without_room_is_reported_before_it_is_full(tmp_path, monkeypatch):
    found = shutil.disk_usage(tmp_path)
    free = iter([found.free, 100])  # at the second save

    def usage(folder):
        assert Path(folder).is_relative_to(tmp_path)
        return found._replace(free=next(free))

    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(UserError, match=r"\(a checkpoint needs 0\.3 MB, and 0\.0 MB are free\)"):
        loop.train(CONFIG, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


# A thread of Orbax may report the failed write once more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_workdir_that_vanishes_is_reported(tmp_path):
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def stop():
        if (workdir / "checkpoints" / "2").exists():
            workdir.rename(elsewhere)
            workdir.write_text("")  # no folder, and none can be made
        return 0

    with pytest.raises(UserError, match="cannot write to the workdir"):
        loop.train(MLP.load_config(**{"train.steps_per_dispatch": 1}), workdir, stop=stop)
    assert (elsewhere / "checkpoints" / "2").is_dir()
    assert read_metrics(elsewhere)


def test_a_process_lost_while_saving_is_not_a_failed_write(tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise JaxRuntimeError("Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(JaxRuntimeError, match="closed by peer"):
        loop.train(CONFIG, tmp_path)


@pytest.mark.parametrize("error", [processes.Lost("lost"), UserError("memory"), None])
def test_nothing_waits_for_the_save_of_a_lost_process(error, tmp_path, monkeypatch):
    closed = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", CONFIG.checkpoint)
    monkeypatch.setattr(checkpoints._manager, "close", lambda: closed.append(True))
    checkpoints.__exit__(type(error), error, None)
    assert bool(closed) == (not isinstance(error, processes.Lost))


# ---- Traces


@pytest.mark.slow
def test_a_trace_of_some_updates(tmp_path):
    loop.train(CONFIG, tmp_path, profile=(4, 5))
    names = [path.name for path in (tmp_path / "profile").rglob("*")]
    assert "perfetto_trace.json.gz" in names
    assert any(name.endswith(".xplane.pb") for name in names)
    assert json.loads((tmp_path / "final.json").read_text())["status"] == "finished"


def test_a_trace_begins_with_the_dispatch_of_its_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: None)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: None)
    cases = ((0, 9, False), (5, 10, True), (15, 25, True), (20, 30, False), (40, 50, False))
    for now, last, expected in cases:
        said = []
        profile = loop.Profile(tmp_path, (10, 20), said.append)
        profile.begin(now, last)
        profile.end(last, None)
        assert bool(said) == (expected and last >= 20)
        profile.close()
        assert bool(said) == expected


def test_an_invalid_range_of_a_trace_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=f"beyond the last step .* two numbers from 1 to {STEPS}"):
        loop.train(CONFIG, tmp_path / "run", profile=(STEPS - 2, STEPS + 1))
    assert list(tmp_path.iterdir()) == []
    for text in ("", "10", "20:10", "0:5", "a:b", "1:2:3"):
        with pytest.raises(SystemExit):
            flags.parse(["--config=a.py", "--workdir=b", f"--profile_steps={text}"])
        assert "FIRST:LAST" in capsys.readouterr().err
