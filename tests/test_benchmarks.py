"""Benchmarks run and print what they promise; how fast anything is, no test asks."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.worker import take_turns

ROOT = Path(__file__).parents[1]
STEPS = "from benchmarks.worker import serve; serve(lambda count: [sum(range(9**4))] * count)"


def test_whole_configs_are_timed_beside_their_peers():
    command = [sys.executable, "-m", "benchmarks.updates", "--turns=2", "--configs"]
    configs = ["configs/mlp.py:smoke train.batch_size=10", "configs/vit.py:smoke", "configs/no.py"]
    done = subprocess.run([*command, *configs], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "there is no config file configs/no.py" in done.stderr
    head, _, mlp, vit = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    rows = [dict(zip(head, row, strict=True)) for row in (mlp, vit)]
    assert [row["config"] for row in rows] == [c.removeprefix("configs/") for c in configs[:2]]
    assert all(float(row["ours, ms"]) > 0 for row in rows)
    ratio = float(rows[0]["peer, ms"]) / float(rows[0]["ours, ms"])
    low, high = map(float, rows[0]["peer / ours"].split("(")[1].strip(")").split("-"))
    assert 0.98 * low <= ratio <= 1.02 * high
    assert rows[1]["peer, ms"] == rows[1]["peer / ours"] == "-"  # the book has no ViT


def test_workers_take_turns_of_the_length_that_is_asked_for():
    commands = {name: [sys.executable, "-c", STEPS] for name in ("ours", "peer")}
    times = take_turns(commands, turns=3, count=2, shortest=0.01)
    assert {name: len(found) for name, found in times.items()} == {"ours": 3, "peer": 3}
    assert all(seconds > 0 for found in times.values() for seconds in found)


def test_a_worker_that_does_not_start_is_an_error():
    commands = {"ours": STEPS, "peer": "raise SystemExit(3)"}
    with pytest.raises(RuntimeError, match=r"SystemExit.* ended before it was ready"):
        take_turns({k: [sys.executable, "-c", v] for k, v in commands.items()}, turns=1, count=1)
