"""Benchmarks run and print what they promise; no test asks how fast anything is."""

import sys

import pytest

from benchmarks import gpu, updates
from benchmarks.worker import take_turns

COST = "from benchmarks.worker import serve; serve(lambda n: [sum(range(9**4))] * n, {'flops': 3})"


def workers(**code):
    return {name: [sys.executable, "-c", lines] for name, lines in code.items()}


@pytest.mark.slow
def test_whole_configs_are_timed_in_turns_with_their_baseline(capfd, monkeypatch):
    monkeypatch.setattr(updates, "SHORTEST", 0.01)
    configs = ["configs/mlp.py:smoke train.batch_size=10", "configs/no.py"]
    assert updates.main(["--turns=2", "--configs", *configs]) == 1
    out, err = capfd.readouterr()
    assert "configs/no.py" in err
    head, _, *lines = (line.strip("| ").split(" | ") for line in out.splitlines())
    ours, nnx = (dict(zip(head, line, strict=False)) for line in lines)
    assert (ours["program"], nnx["program"]) == ("ours", "nnx")
    assert ours["config"] == nnx["config"] == configs[0].removeprefix("configs/")
    ratio = float(nnx["ms a step, median"]) / float(ours["ms a step, median"])
    low, high = map(
        float, nnx["time over ours, median (range)"].split("(")[1].strip(")").split("-")
    )
    assert 0.98 * low <= ratio <= 1.02 * high


@pytest.mark.slow
def test_a_gpus_benchmark_runs_at_smoke_size_and_prints_one_table(capfd, monkeypatch):
    monkeypatch.setattr(updates, "SHORTEST", 0.01)
    assert gpu.main(["--smoke", "--turns=2"]) == 0
    duration, *lines = capfd.readouterr().out.splitlines()
    assert duration.startswith("about 3 minutes")
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row[1] for row in rows[2:4]] == ["ours", "nnx"]
    assert [row[-1] for row in rows[4:6]] == ["True", "True"]  # a CPU repeats every bit
    assert all(float(milliseconds) > 0 for milliseconds in rows[6][2:])


def test_workers_take_turns_of_the_least_duration_and_report_their_cost():
    commands = workers(ours=COST, other=COST, absent="raise SystemExit(3)")
    times, costs = take_turns(commands, turns=3, count=2, shortest=0.01)
    assert {name: len(found) for name, found in times.items()} == {"ours": 3, "other": 3}
    assert all(seconds > 0 for found in times.values() for seconds in found)
    assert costs == {"ours": {"flops": 3}, "other": {"flops": 3}}


def test_a_first_worker_that_does_not_start_is_an_error():
    commands = workers(ours="raise SystemExit(3)", other=COST)
    with pytest.raises(RuntimeError, match="SystemExit"):
        take_turns(commands, turns=1, count=1)
