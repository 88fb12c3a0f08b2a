"""The workdir records a run: metrics, TensorBoard events, final values, config, environment."""

import importlib.metadata
import json
import math
import platform
import shutil
import subprocess

import jax
import numpy as np
import pytest

from rezero_jax.errors import UserError
from rezero_jax.runs import folder
from rezero_jax.runs.files import read_json, write_json
from rezero_jax.runs.folder import environment
from rezero_jax.runs.metrics import MetricsWriter, read_metrics
from rezero_jax.training import cost, loop
from rezero_jax.training.trainer import Trainer
from tests.families import config as load_config
from tests.faults.compare import scalars, without_times

BATCH, SIZE, STEPS, DEPTH = 100, 1437, 32, 4
EPOCH_ENDS = [15, 29]  # ceil(1437 / 100), ceil(2 * 1437 / 100)
EVALS = [8, 15, 22, 29, 32]  # each half epoch, and the end


@pytest.fixture(scope="module")
def config():
    fields = {
        "mesh.data": 1,
        "train.epochs": None,
        "train.steps": STEPS,
        "train.batch_size": BATCH,
        "train.steps_per_dispatch": 4,
        "eval.every_epochs": 0.5,
        "optim.schedule": "linear",
        "optim.alpha.learning_rate": 0.1,
        "log.every_steps": 1,
    }
    return load_config("mlp.py:smoke", **fields)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    loop.train(config, folder)
    return folder


@pytest.fixture(scope="module")
def lines(run):
    return read_metrics(run)


@pytest.mark.guarantee("run folder")
def test_every_step_has_its_line_and_every_line_its_keys(lines):
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    always = {"step", "epoch", "train/loss", "train/accuracy", "grad_norm", "param_norm"}
    always |= {"learning_rate/alpha", "learning_rate/base"}
    always |= {f"alpha/{layer}" for layer in range(DEPTH)}
    for line in lines:
        keys = set(always)
        if line["step"] in EPOCH_ENDS:
            keys.add("train/epoch_loss")
        if line["step"] in EVALS:
            keys |= {"eval/loss", "eval/accuracy"}
        assert set(without_times(line)) == keys
        assert all(math.isfinite(value) for value in line.values())
        assert line["epoch"] == line["step"] * BATCH / SIZE


def test_numbers_are_those_of_the_program(config, lines):
    program = Trainer(config)
    state, losses = program.init(), []
    for line, batch in zip(lines, program.batches(0), strict=True):
        state, report = program.dispatch(state, [batch])
        losses.append(float(report["loss"][0]))
        assert line["train/loss"] == losses[-1]
        assert line["train/accuracy"] == float(report["accuracy"][0])
        assert line["grad_norm"] == float(report["grad_norm"])
        assert line["param_norm"] == float(report["param_norm"])
        alphas = [line[f"alpha/{layer}"] for layer in range(DEPTH)]
        np.testing.assert_array_equal(report["alphas"], np.float32(alphas))
        left = 1 - (line["step"] - 1) / STEPS  # linear to zero
        np.testing.assert_allclose(line["learning_rate/base"], 0.01 * left, rtol=1e-6)
        np.testing.assert_allclose(line["learning_rate/alpha"], 0.1 * left, rtol=1e-6)
        if line["step"] in EVALS:
            assert {k: v for k, v in line.items() if k.startswith("eval/")} == (
                program.evaluate(state)
            )
    start = 0
    for end in EPOCH_ENDS:
        epoch_loss = lines[end - 1]["train/epoch_loss"]
        np.testing.assert_allclose(epoch_loss, np.mean(losses[start:end]), rtol=1e-12)
        start = end


@pytest.mark.slow
def test_a_run_with_fewer_lines_has_the_same_numbers_and_utilisation(
    config, lines, tmp_path, monkeypatch
):
    """An epoch's loss also counts the steps without a line; utilisation needs a known peak."""
    monkeypatch.setitem(cost.PEAK_FLOPS, "cpu", 1e9)
    flops = cost.model_flops(Trainer(config))
    config = config.copy_and_resolve_references()
    config.log.every_steps = 7
    config.train.steps_per_dispatch = 3
    loop.train(config, tmp_path)
    sparse = {line["step"]: line for line in read_metrics(tmp_path)}
    assert sorted(sparse) == sorted({7, 14, 21, 28, *EPOCH_ENDS, *EVALS})
    for step, line in sparse.items():
        assert without_times(line) == without_times(lines[step - 1])
        if step > 7:  # before the first line, there is no rate
            np.testing.assert_allclose(line["mfu"], flops / line["time/step"] / 1e9)


def test_tensorboard_shows_the_same_numbers(run, lines):
    expected = {
        (line["step"], name): np.float32(value)
        for line in lines
        for name, value in line.items()
        if name != "step"
    }
    assert scalars(run / "tensorboard") == expected


@pytest.mark.guarantee("run folder")
def test_final_values(run, lines):
    final = json.loads((run / "final.json").read_text())
    last = lines[-1]
    assert final["status"] == "finished"
    assert final["steps"] == STEPS
    assert final["parameters"] == 64 * 8 + 8 + DEPTH * (8 * 8 + 8 + 1) + 8 * 10 + 10
    for name in ("epoch", "train/loss", "train/accuracy", "eval/loss", "eval/accuracy"):
        assert final[name] == last[name]
    assert final["train/epoch_loss"] == lines[EPOCH_ENDS[-1] - 1]["train/epoch_loss"]
    evaluations = [line for line in lines if line["step"] in EVALS]
    assert final["best/eval/loss"] == min(line["eval/loss"] for line in evaluations)
    assert final["best/eval/accuracy"] == max(line["eval/accuracy"] for line in evaluations)
    rate = STEPS * BATCH / (final["time/update"] + final["time/data"])
    np.testing.assert_allclose(final["examples_per_second"], rate)


@pytest.mark.guarantee("run folder")
def test_config_and_environment(run, config):
    assert json.loads((run / "config.json").read_text()) == json.loads(config.to_json())
    found = json.loads((run / "environment.json").read_text())
    assert found == environment() | {"seconds": 0.0}
    assert found["python"] == platform.python_version()
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        assert found[name] == importlib.metadata.version(name)
    assert found["devices"] == jax.device_count() == 8
    assert found["device"] == jax.devices()[0].device_kind


def written(folder, steps, after=0):
    """A writer that has written lines of these steps, with loss 1 / step."""
    writer = MetricsWriter(folder, after)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    return writer


def test_the_commit_is_of_the_project_and_git_is_not_needed(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", tmp_path, *author, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    packages = [tmp_path / name / "rezero_jax" for name in ("", "vendored", "site")]
    for package in packages:
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    git("add", "rezero_jax", "vendored")
    git("commit", "-m", "a")
    found = [folder._commit(package) for package in packages]
    assert found == [git("rev-parse", "HEAD"), None, None]
    git("rm", "--cached", "-r", "rezero_jax")  # as after pip install --target=.
    assert folder._commit(packages[0]) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert folder._commit(packages[0]) is None
    assert folder._version("no-such-package") is None


def test_each_line_is_on_disk_when_written_and_a_truncated_line_is_left_out(tmp_path):
    writer = written(tmp_path, (1, 2, 3))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    writer.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for end in range(whole.rindex('{"step": 3'), len(whole) - 1):
        path.write_text(whole[:end])
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_resumed_record_drops_the_updates_that_are_made_again(tmp_path):
    written(tmp_path, (1, 2, 3, 4)).close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"train/loss": 9.0})
    writer.close()
    expected = [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == expected
    assert scalars(tmp_path / "tensorboard") == {(s, "train/loss"): v for s, v in expected}


def test_tensorboard_has_no_gap_after_a_kill_or_when_the_clock_jumps(tmp_path, monkeypatch):
    (tmp_path / "killed").mkdir()
    killed = written(tmp_path / "killed", range(1, 51))
    shutil.copytree(tmp_path / "killed", tmp_path / "run")  # its state on the disk now
    killed.close()
    for step, now in ((41, 0.0), (42, 9e9), (43, -1e9), (44, 1e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        written(tmp_path / "run", (step,), after=step - 1).close()
    expected = {(step, "train/loss"): np.float32(1.0 / step) for step in range(1, 45)}
    assert scalars(tmp_path / "run" / "tensorboard") == expected


def test_a_broken_line_loses_no_other_line(tmp_path, capsys):
    written(tmp_path, range(1, 10)).close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = [b"{", b"\xff", b"[1]", b"{}", b'{"step": "1"}', b'{"step": true}', b'{"step": 1e3}']
    broken += [b'{"step": 1, "a": "x"}', b"[" * 99999, b'{"step": ' + b"9" * 30 + b"}", b"\0" * 50]
    path.write_bytes(b"".join([*lines[:4], *(text + b"\n" for text in broken), *lines[4:]]))
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{path} has {len(broken)} broken line(s), which are left out (line 5 first)" in warning
    written(tmp_path, (8,), after=7).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))


def test_a_json_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "final.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with path.open() as old:  # a file rewritten in place would be half written after a kill
        write_json(path, {"a": 2})
        assert json.load(old) == {"a": 1}
    assert read_json(path) == {"a": 2}
    path.write_text("[]")
    with pytest.raises(UserError, match=r"final\.json is broken"):
        read_json(path)
    with pytest.raises(UserError, match=r"no run: it has no config\.json"):
        read_json(tmp_path / "config.json")


def test_the_best_bits_per_byte_are_the_fewest(trained):
    lines = read_metrics(trained("transformer"))
    bits = [line["eval/bits_per_byte"] for line in lines if "eval/bits_per_byte" in line]
    final = read_json(trained("transformer") / "final.json")
    assert final["best/eval/bits_per_byte"] == min(bits) < max(bits)
