"""Several processes of one run, on this machine: they train as one and stop as one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch.connect import connect
from launch.local import free_port
from rezero_jax import processes
from rezero_jax.data.split import ResidentSplit
from rezero_jax.data.text import TextSplit
from rezero_jax.errors import Unavailable, UserError
from rezero_jax.processes import Lost
from rezero_jax.runs.metrics import read_metrics
from tests.families import ROOT, command, run

STEPS, SAVE = 300, 100
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
AGAIN = "start the same command on every host again"
LIMIT = 120  # seconds; what a test waits for takes ten


def start(count, workdir, before=(), file="mlp.py:smoke", **fields):
    """`count` processes of the command, each with one device; `before` precedes train.py."""
    flags = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    python, *argv = command(file, workdir, *flags, **(FIELDS | {"mesh.cpu_devices": 1} | fields))
    return [
        subprocess.Popen(
            [python, *before, *argv, f"--process_id={i}"],
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


def alone(workdir, devices, file="mlp.py:smoke", **fields):
    """One process with `devices` devices, to its end."""
    result = run(command(file, workdir, **(FIELDS | {"mesh.cpu_devices": devices} | fields)))
    assert result.returncode == 0, result.stderr


def wait_until(true):
    started = time.monotonic()
    while not true():
        assert time.monotonic() < started + LIMIT
        time.sleep(0.01)


def assert_same_curve(one, other, steps=None):
    """Asserts that lines up to a step agree, except for the order in which float32 is summed."""
    a, b = (
        [line for line in read_metrics(x) if not steps or line["step"] <= steps]
        for x in (one, other)
    )
    assert [line["step"] for line in a] == [line["step"] for line in b] != []
    for name in ("train/loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose([x[name] for x in a], [x[name] for x in b], rtol=2e-3)
    if not steps:
        np.testing.assert_allclose(a[-1]["eval/loss"], b[-1]["eval/loss"], rtol=1e-3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    alone(workdir, 2)
    return workdir


def test_two_processes_train_as_one_and_a_signal_to_one_stops_both(straight, tmp_path):
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
    assert_same_curve(straight, tmp_path, step)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_any_topology_resumes(victim, straight, tmp_path):
    processes = start(2, tmp_path)
    wait_until((tmp_path / "checkpoints" / str(SAVE)).exists)
    processes[victim].kill()
    killed = time.monotonic()
    results = end(processes)
    assert time.monotonic() < killed + 60
    assert results[victim][0] == -signal.SIGKILL
    status, _, err = results[1 - victim]
    assert status in (4, -signal.SIGABRT), err  # JAX aborts when the coordinator is lost
    assert AGAIN in err or "JAX distributed service detected fatal errors" in err
    if victim == 0:
        (status, out, err), (status_1, *_) = end(start(2, tmp_path))
        assert (status, status_1) == (0, 0), err
        assert "resuming after step " in out
    else:
        alone(tmp_path, 1)
    assert_same_curve(straight, tmp_path)


@pytest.mark.slow
def test_all_processes_learn_of_a_damaged_checkpoint_and_of_a_workdir_in_use(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    (workdir / "final.json").unlink()
    for path in (workdir / "checkpoints" / str(STEPS) / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    (status, out, err), (status_1, _, err_1) = end(start(2, workdir))
    assert (status, status_1) == (0, 0), err + err_1
    assert f"warning: checkpoint {STEPS} is damaged" in err
    assert "warning: checkpoint" not in err_1
    assert f"resuming after step {STEPS - SAVE}" in out
    assert_same_curve(straight, workdir)

    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time\n"
         "lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print(1, flush=True)\n"
         "time.sleep(600)", workdir / ".lock"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.read(1)
        for status, _, err in end(start(2, workdir)):
            # A process that ends last may notice the end of the other one first.
            assert status in (2, 4, -signal.SIGABRT), err
            assert status != 2 or "another process is training in" in err
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
        "train.steps": 20,
        "log.every_steps": 1,
        "optim.name": "sgd",  # Adam's first steps are signs, which rounding may flip
        "optim.schedule": "constant",
        "optim.learning_rate": 0.02,
        "eval.examples": 120,
    } | fields
    alone(tmp_path / "one", 4, file, **common)
    for status, _, err in end(start(4, tmp_path / "four", file=file, **common)):
        assert status == 0, err
    assert_same_curve(tmp_path / "one", tmp_path / "four")


WAITING = """\
import os
from launch.connect import connect
from rezero_jax import processes
try:
    connect(*{args}, wait=3)
except processes.Lost as error:
    print(error, flush=True)
    os._exit(error.status)
"""
STEP = {"STEP_NODELIST": "localhost", "NTASKS": "4", "PROCID": "1", "LOCALID": "1", "JOB_ID": "7"}


@pytest.mark.parametrize(
    ("args", "variables", "where"),
    [
        (("localhost:1", 1, 2), {}, " at localhost:1"),
        # A command started by hand in an allocation for four tasks.
        pytest.param((), STEP, "", marks=pytest.mark.slow),
    ],
)
def test_a_missing_process_is_reported_in_time_and_waiting_at_once(args, variables, where):
    env = os.environ | {f"SLURM_{name}": value for name, value in variables.items()}
    result = run([sys.executable, "-c", WAITING.format(args=args)], cwd=ROOT, env=env)
    assert result.returncode == 4, result.stderr
    notice = f"waiting up to 3 s for the other processes of this run{where}; to run alone, stop"
    assert notice in result.stderr
    assert "add --num_processes=1" in result.stderr
    assert f"connected{where} within 3 s; start the same" in result.stdout


@pytest.fixture
def started(monkeypatch):
    """The arguments with which `connect` starts JAX's coordinator, which does not start."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **kw: calls.append((*a, kw)))
    monkeypatch.setattr(jax.config, "update", lambda name, value: calls.append((name, value)))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    # Undone after the test, whatever `connect` sets.
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "")
    monkeypatch.delenv("JAX_COORDINATOR_PORT")
    return calls


ONE_GPU = [("jax_cuda_visible_devices", "all"), ("jax_rocm_visible_devices", "all")]


def test_one_process_needs_no_coordinator_and_sees_all_devices(started, monkeypatch):
    for names in (
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"},
        {f"SLURM_{name}": value for name, value in (STEP | {"NTASKS": "1"}).items()},
        # An interactive step.
        {f"SLURM_{name}": value for name, value in (STEP | {"STEP_NUM_TASKS": "1"}).items()},
    ):
        with monkeypatch.context() as patched:
            for name, value in names.items():
                patched.setenv(name, value)
            connect()
        assert started == []


@pytest.mark.parametrize(("nodes", "seen"), [("4", ONE_GPU), ("2", [])])
def test_steps_of_a_job_have_ports_of_their_own(nodes, seen, started, monkeypatch):
    ports = []
    for step in ("0", "1"):
        started.clear()
        monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
        for name, value in (STEP | {"STEP_ID": step, "STEP_NUM_NODES": nodes}).items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        connect()
        assert started[2:] == seen  # one task on a node has all GPUs of the node
        ports.append(int(os.environ["JAX_COORDINATOR_PORT"]))
    assert len(set(ports)) == 2
    assert all(1024 < port < 2**16 for port in ports)


def test_the_coordinator_of_local_processes_is_on_loopback_and_its_port_its_own(started):
    for address, bound in (("localhost:1", "localhost:1"), ("10.0.0.1:1", None)):
        connect(address, 1, 2)
        options = started.pop()[-1]
        assert options["coordinator_bind_address"] == bound
        assert options["cluster_detection_method"] == "deactivate"
    with socket.create_server(("", 0), reuse_port=True) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}.*--num_processes=1"):
            connect(f"localhost:{port}", 0, 2)
    connect(f"localhost:{port}", 0, 2)


def test_flags_that_contradict_each_other_are_refused_and_one_process_looks_for_no_others():
    for flags, sentence in (
        (("a:1", None, None), "--process_id and --num_processes missing"),
        ((None, 0, 2), "--coordinator missing"),
        (("a:1", 2, 2), "--process_id=2 is not below --num_processes=2"),
        (("a", 0, 2), "--coordinator=a is not HOST:PORT"),
        (("a:99999", 0, 2), "--coordinator=a:99999 is not HOST:PORT"),
    ):
        with pytest.raises(UserError, match=f"^{sentence}"):
            connect(*flags)
    connect(num_processes=1)
    assert processes.is_first()
    assert processes.on_first(lambda: {"a": 1}) == {"a": 1}
    assert processes.agree(True)
    assert not processes.agree(False)
    processes.shutdown()


@pytest.mark.parametrize(
    ("error", "alone", "together"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore\nlines"), UserError, UserError),
        (RuntimeError("INTERNAL: cuInit: CUDA_ERROR_OUT_OF_MEMORY"), UserError, UserError),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), UserError, UserError),
        (RuntimeError("Connection closed by peer"), RuntimeError, Lost),
        (ValueError("UNKNOWN: Gloo AllGather failed"), ValueError, Lost),
        (ValueError("a mistake"), ValueError, ValueError),
    ],
)
def test_the_cause_of_an_error_of_jax(error, alone, together, monkeypatch):
    for count, expected in ((1, alone), (2, together)):
        monkeypatch.setattr(processes.jax, "process_count", lambda count=count: count)
        with pytest.raises(expected) as info:
            processes.raise_cause(error)
        assert type(info.value) is expected
        assert (info.value is error) == (expected is type(error))
        if expected is UserError:
            assert str(info.value).startswith("a device is out of memory")
            assert "\n" not in str(info.value)


def test_an_error_of_the_first_process_is_raised_in_every_process(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", lambda x: x)
    for kind in (UserError, Unavailable):

        def work(kind=kind):
            raise kind("no bucket")

        with pytest.raises(kind, match="no bucket") as info:
            processes.on_first(work)
        assert type(info.value) is kind


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
    shards = [split.fetch(indices, 5, slice(i, i + 4)) for i in (0, 4, 8)]
    (streamed,) = split.batches(lambda step: indices, 5, 6, slice(4, 8))
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([shard[name] for shard in shards]), values)
        np.testing.assert_array_equal(streamed[name], values[4:8])
