"""Several processes of one run, on this machine: they train as one and stop as one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch.local import free_port
from rezero_jax import processes
from rezero_jax.data.split import ResidentSplit
from rezero_jax.data.text import TextSplit
from rezero_jax.errors import UserError
from rezero_jax.processes import LOST
from rezero_jax.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, SAVE = 600, 100
FIELDS = {
    "train.epochs": None,
    "train.steps": STEPS,
    "train.batch_size": 48,
    "train.steps_per_dispatch": 5,
    "eval.every_epochs": None,
    "eval.batch_size": 120,
    "checkpoint.every_steps": SAVE,
    "log.every_steps": 10,
}
AGAIN = "start the same command on every host again, and it resumes from the newest checkpoint"
LIMIT = 120  # seconds; what a test waits for takes ten


def command(workdir, file="mlp.py:smoke", **fields):
    flags = [f"--config.{key}={value}" for key, value in (FIELDS | fields).items()]
    config = f"--config={ROOT / 'configs' / file}"
    return [sys.executable, ROOT / "train.py", config, f"--workdir={workdir}", *flags]


def start(count, workdir, before=(), **fields):
    """`count` processes of the command, each with one device; `before` precedes train.py."""
    flags = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    python, *argv = command(workdir, **{"mesh.cpu_devices": 1} | fields)
    return [
        subprocess.Popen(
            [python, *before, *argv, *flags, f"--process_id={i}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def end(processes):
    """[(exit status, stdout, stderr)] of processes at their end."""
    try:
        told = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, told, strict=True)]


def alone(workdir, devices, **fields):
    """One process with so many devices, to its end."""
    subprocess.run(
        command(workdir, **{"mesh.cpu_devices": devices} | fields), check=True, capture_output=True
    )


def wait_until(true):
    started = time.monotonic()
    while not true():
        assert time.monotonic() < started + LIMIT
        time.sleep(0.01)


def assert_same_curve(one, other):
    """The same lines; their numbers agree but for the order in which float32 is summed."""
    a, b = read_metrics(one), read_metrics(other)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for name in ("train/loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose([x[name] for x in a], [x[name] for x in b], rtol=2e-3)
    np.testing.assert_allclose(a[-1]["eval/loss"], b[-1]["eval/loss"], rtol=1e-3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    alone(workdir, 2)
    assert read_metrics(workdir)[-1]["eval/accuracy"] > 0.8
    return workdir


def test_a_signal_to_one_process_stops_all_and_another_topology_resumes(straight, tmp_path):
    processes = start(2, tmp_path)
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and read_metrics(tmp_path))
    processes[1].send_signal(signal.SIGTERM)
    (status, out, err), (status_1, out_1, err_1) = end(processes)
    assert (status, status_1) == (143, 143), err + err_1
    (step,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    for text in (err, err_1):
        assert f"train.py: stopped after step {step} and saved" in text
        assert "Traceback" not in text
    assert "2 device(s)" in out
    assert "device(s)" not in out_1  # the first process speaks for all
    assert not (tmp_path / "final.json").exists()
    assert json.loads((tmp_path / "environment.json").read_text())["processes"] == 2
    alone(tmp_path, 1)
    assert_same_curve(straight, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_command_resumes(victim, straight, tmp_path):
    processes = start(2, tmp_path)
    wait_until((tmp_path / "checkpoints" / str(SAVE)).exists)
    processes[victim].kill()
    killed = time.monotonic()
    results = end(processes)
    assert time.monotonic() < killed + 60
    assert results[victim][0] == -signal.SIGKILL
    status, _, err = results[1 - victim]
    assert status == LOST, err
    assert err.endswith(f"{AGAIN}\n")
    assert "Traceback" not in err
    (status, out, err), (status_1, *_) = end(start(2, tmp_path))
    assert (status, status_1) == (0, 0), err
    assert "resuming after step " in out
    assert_same_curve(straight, tmp_path)
    assert json.loads((tmp_path / "final.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_damaged_checkpoint_and_a_held_workdir_are_told_by_all(straight, tmp_path):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", straight, workdir], check=True)
    (workdir / "final.json").unlink()
    for path in (workdir / "checkpoints" / str(STEPS) / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    (status, out, err), (status_1, _, err_1) = end(start(2, workdir))
    assert (status, status_1) == (0, 0), err + err_1
    assert f"warning: checkpoint {STEPS} is damaged" in err
    assert "warning" not in err_1
    assert f"resuming after step {STEPS - SAVE}" in out
    assert_same_curve(straight, workdir)

    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time\n"
         "lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); print(1, flush=True)\n"
         "time.sleep(600)", workdir / ".lock"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.read(1)
        for status, _, err in end(start(2, workdir)):
            # The sentence of the process that ends last may give way to that of a lost process.
            assert status in (2, LOST), err
            assert "Traceback" not in err
            assert "another process is training in" in err or AGAIN in err
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("mlp.py:smoke", {"mesh.fully_sharded": True}),
        ("resnet.py:smoke", {"data.crop_padding": 2, "data.flip": True}),
        ("transformer_small.py:smoke", {"mesh.model": 2, "data.windows": "random"}),
    ],
)
def test_four_processes_train_as_one(file, fields, tmp_path):
    common = {
        "file": file,
        "train.steps": 20,
        "log.every_steps": 1,
        "optim.name": "sgd",  # Adam's first steps are signs, which rounding may flip
        "optim.schedule": "constant",
        "optim.learning_rate": 0.02,
        "eval.examples": 120,
    } | fields
    alone(tmp_path / "one", 4, **common)
    for status, _, err in end(start(4, tmp_path / "four", **common)):
        assert status == 0, err
    assert_same_curve(tmp_path / "one", tmp_path / "four")


def test_a_missing_process_is_told_in_time():
    code = "from rezero_jax import processes; processes.initialize('localhost:1', 1, 2, wait=2)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == LOST
    assert (
        "did not all connect at localhost:1 within 2 s; start the same command on every host"
        in (result.stderr)
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("a:1", None, None), "--process_id and --num_processes missing"),
        ((None, 0, 2), "--coordinator missing"),
        (("a:1", 2, 2), "--process_id=2 is not in 0 .. 1"),
        (("a", 0, 2), "--coordinator=a is not HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_told(flags, sentence):
    with pytest.raises(UserError, match=f"^{sentence}") as info:
        processes.initialize(*flags)
    assert "\n" not in str(info.value)


def test_one_process_looks_for_no_others():
    processes.initialize(num_processes=1)
    assert processes.is_first()
    assert processes.on_first(lambda: {"a": 1}) == {"a": 1}
    assert processes.agree(True)
    assert not processes.agree(False)
    processes.shutdown()
    with pytest.raises(RuntimeError, match="out of memory"):
        processes.end_after_loss(RuntimeError("out of memory"))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore\nlines",
        "INTERNAL: cuInit: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "INTERNAL: the library cuBLAS was not initialised: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_an_exhausted_memory_is_no_lost_process(text, count, monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: count)
    error = RuntimeError(text)
    with pytest.raises(UserError, match=r"^a device is out of memory") as info:
        processes.end_after_loss(error)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("is_lost", [True, False])
def test_an_error_of_jax_is_a_lost_process_whatever_its_type(is_lost, monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_end", lambda status, _: sys.exit(status))
    error = ValueError("UNKNOWN: Gloo AllGather failed" if is_lost else "a mistake")
    with pytest.raises(SystemExit if is_lost else ValueError) as info:
        processes.end_after_loss(error)
    assert getattr(info.value, "code", LOST) == LOST


EXHAUSTED = """\
import runpy, sys, jax
from rezero_jax.training.trainer import Trainer
dispatch = Trainer.dispatch
def exhausted(self, state, batches, stop=0):
    if "--process_id=1" in sys.argv and int(state["step"]) >= 20:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    return dispatch(self, state, batches, stop)
Trainer.dispatch = exhausted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_one_of_two_whose_memory_is_exhausted_says_so_and_both_end(tmp_path):
    lone, exhausted = end(start(2, tmp_path, before=("-c", EXHAUSTED)))
    sentence = "train.py: a device is out of memory (RESOURCE_EXHAUSTED: Out of memory allocating"
    assert exhausted[0] == 2
    assert exhausted[2].splitlines()[-1].startswith(sentence)
    assert "another process" not in exhausted[2]
    assert lone[0] == LOST
    assert "another process of this run has stopped, and has said why" in lone[2]


@pytest.mark.parametrize(
    "split",
    [
        ResidentSplit({"image": np.zeros((90, 1)), "label": np.zeros(90)}),
        TextSplit(np.arange(1000, dtype=np.uint8), 10, random=True, seed=3),
        TextSplit(np.arange(1000, dtype=np.uint8), 10, context=3, whole=True),
    ],
    ids=["resident", "random windows", "whole text"],
)
def test_rows_of_a_batch_are_the_same_wherever_they_are_fetched(split):
    indices = np.random.default_rng(0).permutation(split.size)[:12]
    whole = split.fetch(indices, 5)
    parts = [split.fetch(indices, 5, slice(i, i + 4)) for i in (0, 4, 8)]
    (streamed,) = split.batches(lambda step: indices, 5, 6, slice(4, 8))
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
        np.testing.assert_array_equal(streamed[name], values[4:8])
