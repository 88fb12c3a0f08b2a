"""Benchmarks run and print what they promise; no test asks how fast anything is."""

import importlib.util
import runpy
import sys
import time

import pytest

from benchmarks import gpu, updates, worker
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


PYTORCH = ("torch", "rezero", "x_transformers")
MISSING = [name for name in PYTORCH if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(
            [f"--torch-python={sys.executable}"],
            marks=pytest.mark.skipif(
                bool(MISSING), reason=f"{MISSING} missing, see benchmarks/requirements.txt"
            ),
        ),
    ],
)
def test_a_gpus_benchmark_runs_at_smoke_size_and_prints_one_table(flags, capfd, monkeypatch):
    monkeypatch.setattr(updates, "SHORTEST", 0.01)
    monkeypatch.setattr(gpu, "LIMIT", 3600)  # a busy machine
    assert gpu.main(["--smoke", "--turns=2", *flags]) == 0
    out = capfd.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    wanted = [name for row in gpu.SMOKE for name in ("ours", *row.baselines)]
    if not flags:
        wanted = ["ours", "nnx"] * len(gpu.SMOKE)
    programs, rest = rows[2 : 2 + len(wanted)], rows[2 + len(wanted) :]
    assert [row[1] for row in programs] == wanted
    assert all(float(row[2]) > 0 for row in programs)
    assert [row[-1] for row in rest[:2]] == ["True", "True"]  # a CPU repeats every bit
    assert all(float(milliseconds) > 0 for milliseconds in rest[2][2:])


def test_a_gpus_benchmark_ends_in_time_and_names_what_it_did_not_run(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 0)
    monkeypatch.setattr(gpu, "output", lambda command, *_: "cpu")
    monkeypatch.setattr(gpu, "cost_of_determinism", lambda *_: ["1", "2"])
    assert gpu.main(["--smoke"]) == 1
    out = capsys.readouterr().out
    for row in gpu.SMOKE:
        assert f"| {row.spec} | not measured: no time is left |" in out
    assert gpu.main([]) == 2
    assert "JAX finds no GPU here, only a cpu" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["torch_worker", "notebook_start"])
def test_the_help_of_a_program_of_pytorch_needs_no_pytorch(module, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")
    assert "usage" in capsys.readouterr().out


def test_a_worker_without_cost_and_one_that_fails_in_its_turn():
    code = "from benchmarks.worker import serve; serve(lambda n: 1 / (n - 2))"
    times, _ = take_turns(workers(a=COST, b=code.replace("2", "9"), c=code), turns=2, count=2)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_a_worker_that_is_late_is_omitted(monkeypatch):
    monkeypatch.setattr(worker, "TIMING", 3)
    commands = workers(ours=COST, late=f"import time; time.sleep(600); {COST}")
    until = time.monotonic() + 9
    assert list(take_turns(commands, turns=1, count=1, until=until)[0]) == ["ours"]


@pytest.mark.parametrize(("limit", "order"), [(3, "abab"), (2, "aabb")])
def test_workers_that_exceed_a_gpus_memory_run_one_after_another(limit, order, tmp_path):
    log = tmp_path / "log"

    def code(name):
        return (
            f"from benchmarks.worker import serve; log = open({str(log)!r}, 'ab', 0)\n"
            f"serve(lambda n: n == 1 and log.write(b{name!r}), {{'memory': 1.5, 'limit': {limit}}})"
        )

    times, _ = take_turns(workers(a=code("a"), b=code("b")), turns=2, count=1)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}
    assert log.read_text() == order


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
