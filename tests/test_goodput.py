"""Wall time of a run by kind, over all its starts, the killed ones included."""

import json

import numpy as np
import pytest

import train
from rezero_jax.runs.metrics import MetricsWriter, read_metrics
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training import loop
from rezero_jax.training.progress import TIMES, Clock
from tests.families import FAMILIES


@pytest.fixture
def clock_at(monkeypatch):
    """Sets the time that a Clock reads."""

    def set_time(seconds):
        monkeypatch.setattr("time.perf_counter", lambda: seconds)

    return set_time


def test_all_time_that_is_not_waited_is_updates(clock_at):
    clock_at(103.0)
    clock = Clock(began=100.0)
    for what, seconds in (("compilation", 7.0), ("data", 2.0), ("evaluation", 1.0)):
        clock.add(what, seconds)
    clock_at(120.0)
    with clock.timed("checkpoint"):
        clock_at(123.0)
    expected = dict.fromkeys(TIMES, 0.0) | {"start": 3.0, "compilation": 7.0, "data": 2.0}
    expected |= {"evaluation": 1.0, "checkpoint": 3.0, "update": 7.0}
    assert clock.times() == expected
    assert sum(expected.values()) == clock.wall == 23.0


def test_the_time_of_killed_starts_since_the_checkpoint_is_lost(clock_at):
    saved = {"update": 40.0, "start": 5.0, "data": 5.0}
    clock_at(1000.0)
    clock = Clock(began=990.0, saved=saved, recorded=80.0)
    clock_at(1020.0)
    expected = dict.fromkeys(TIMES, 0.0)
    expected |= {"update": 60.0, "start": 15.0, "data": 5.0, "lost": 30.0}
    assert clock.times() == expected
    # A process that was asked to stop saved after its last line, so nothing is lost.
    assert Clock(began=1020.0, saved=saved, recorded=45.0).times()["lost"] == 0


def check_sum(final):
    spent = [final[f"time/{kind}"] for kind in TIMES]
    assert min(spent) >= 0
    np.testing.assert_allclose(sum(spent), final["seconds"])
    np.testing.assert_allclose(final["goodput"], final["time/update"] / final["seconds"])


def test_the_kinds_add_up_to_the_wall_time(trained):
    final = json.loads((trained("mlp") / "final.json").read_text())
    check_sum(final)
    assert final["time/lost"] == 0
    assert 0 < final["goodput"] < 1
    lines = read_metrics(trained("mlp"))
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= final["seconds"]
    for kind in ("start", "compilation", "evaluation"):
        reported = sum(line.get(f"time/{kind}", 0.0) for line in lines)
        assert 0 < reported <= final[f"time/{kind}"] + 1e-9, kind


def test_starts_killed_before_a_new_checkpoint_are_lost_time(copy_of):
    """The first start is killed before the checkpoint of step 6."""
    folder, config = copy_of("mlp", 4), FAMILIES["mlp"].load_config()
    lines = [line for line in read_metrics(folder) if line["step"] < 6]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # killed once they have dropped the lines of the first start
        Workdir(folder, config).release()
        MetricsWriter(folder, 4).close()
    record = folder / "checkpoints/4/record/metadata"
    kept = sum(json.loads(record.read_text())["progress"]["time"].values())
    final = loop.train(config, folder)
    check_sum(final)
    np.testing.assert_allclose(final["time/lost"], lines[-1]["seconds"] - kept)
    assert final["time/lost"] > 0


def test_a_plot_that_cannot_be_drawn_is_a_warning(trained, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no font")

    monkeypatch.setattr("rezero_jax.analysis.plots.write_plot", fail)
    final = json.loads((trained("mlp") / "final.json").read_text())
    lines = list(train._summary(final, str(trained("mlp"))))
    assert lines[0].startswith("finished 8 steps: eval/accuracy")
    assert "no font" in capsys.readouterr().err
