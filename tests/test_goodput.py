"""Where the wall time of a run went, over all its starts, those that were killed included."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rezero_jax.config import load_config
from rezero_jax.runs.folder import Workdir
from rezero_jax.runs.metrics import MetricsWriter, read_metrics
from rezero_jax.training import loop
from rezero_jax.training.progress import TIMES, Clock

MLP = str(Path(__file__).parents[1] / "configs/mlp.py")


@pytest.fixture
def clock_at(monkeypatch):
    """Sets the time that a Clock reads."""

    def set_time(seconds):
        monkeypatch.setattr("time.perf_counter", lambda: seconds)

    return set_time


def test_what_is_not_waited_for_are_updates(clock_at):
    clock_at(103.0)
    clock = Clock(began=100.0)
    for what, seconds in (("compilation", 7.0), ("data", 2.0), ("evaluation", 1.0)):
        clock.add(what, seconds)
    clock_at(120.0)
    with clock.timed("checkpoint"):
        clock_at(123.0)
    expected = dict.fromkeys(TIMES, 0.0) | {
        "start": 3.0,
        "compilation": 7.0,
        "data": 2.0,
        "evaluation": 1.0,
        "checkpoint": 3.0,
        "update": 7.0,
    }
    assert clock.times() == expected
    assert sum(expected.values()) == clock.wall == 23.0


def test_the_time_of_killed_starts_since_the_checkpoint_is_lost(clock_at):
    saved = {"update": 40.0, "start": 5.0, "data": 5.0}
    clock_at(1000.0)
    clock = Clock(began=990.0, saved=saved, recorded=80.0)
    clock_at(1020.0)
    expected = dict.fromkeys(TIMES, 0.0) | {
        "update": 60.0,
        "start": 15.0,
        "data": 5.0,
        "lost": 30.0,
    }
    assert clock.times() == expected
    # A process that was told to stop saved after its last line, and loses nothing.
    assert Clock(began=1020.0, saved=saved, recorded=45.0).times()["lost"] == 0


@pytest.fixture(scope="module")
def config():
    fields = {
        "train.epochs": None,
        "train.steps": 40,
        "eval.every_epochs": 1.0,
        "checkpoint.every_steps": 10,
        "checkpoint.keep": 4,
        "log.every_steps": 3,
        "mesh.data": 1,
    }
    return load_config(f"{MLP}:smoke", [f"{key}={value}" for key, value in fields.items()])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("finished")
    loop.train(config, folder)
    return folder


def killed_after(folder, finished, step):
    """The run as `kill -9` would have left it before the checkpoint of `step` was written."""
    shutil.copytree(finished, folder)
    (folder / "final.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) >= step:
            shutil.rmtree(path)
    lines = [line for line in read_metrics(folder) if line["step"] < step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines[-1]["seconds"]


def kept_time(folder, step):
    record = folder / "checkpoints" / str(step) / "record" / "metadata"
    return sum(json.loads(record.read_text())["progress"]["time"].values())


def check_sum(final):
    spent = [final[f"time/{what}"] for what in TIMES]
    assert min(spent) >= 0
    np.testing.assert_allclose(sum(spent), final["seconds"])
    np.testing.assert_allclose(final["goodput"], final["time/update"] / final["seconds"])


def test_the_parts_add_up_to_the_wall_time(finished):
    final = json.loads((finished / "final.json").read_text())
    check_sum(final)
    assert final["time/lost"] == 0
    assert 0 < final["goodput"] < 1
    lines = read_metrics(finished)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= final["seconds"]
    for what in ("start", "compilation", "evaluation"):
        told = sum(line.get(f"time/{what}", 0.0) for line in lines)
        assert 0 < told <= final[f"time/{what}"] + 1e-9, what


def test_starts_killed_before_a_new_checkpoint_are_lost_time(config, finished, tmp_path):
    folder = tmp_path / "run"
    wall = killed_after(folder, finished, 30)
    for _ in range(2):  # killed once it has dropped the lines of the first one
        Workdir(folder, config)
        MetricsWriter(folder, 20).close()
    final = loop.train(config, folder)
    check_sum(final)
    np.testing.assert_allclose(final["time/lost"], wall - kept_time(folder, 20))
    assert final["time/lost"] > 0


def test_a_run_killed_before_its_first_checkpoint_has_lost_it_all(config, finished, tmp_path):
    folder = tmp_path / "run"
    wall = killed_after(folder, finished, 10)
    final = loop.train(config, folder)
    check_sum(final)
    np.testing.assert_allclose(final["time/lost"], wall)
