"""Whatever stops a run, the same command resumes it and ends with the same bits."""

import json
import os
import re
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

from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.folder import Workdir, saved_steps
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from rezero_jax.training.load import load_model
from rezero_jax.training.trainer import Trainer
from tests.faults.compare import differences, final, metrics, saved

# When one read of a damaged checkpoint fails, Orbax drops the other failed reads unseen; Python
# complains of them whenever they are collected, perhaps during a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[1]
STEPS, SAVE = 300, 50
FIELDS = {
    "train.epochs": None,
    "train.steps": STEPS,
    "train.steps_per_dispatch": 7,  # does not divide what is due
    "eval.every_epochs": 2.0,
    "checkpoint.every_steps": SAVE,
    "checkpoint.keep": 3,
    "log.every_steps": 3,
    "mesh.data": 1,
}


def settings(**fields):
    return [f"{key}={value}" for key, value in (FIELDS | fields).items()]


def command(workdir, *flags, **fields):
    overrides = [f"--config.{text}" for text in settings(**fields)]
    spec = f"--config={ROOT / 'configs/mlp.py'}:smoke"
    return [sys.executable, ROOT / "train.py", spec, f"--workdir={workdir}", *overrides, *flags]


def run(workdir, *flags, **fields):
    """A new process with the command, to its end."""
    return subprocess.run(
        command(workdir, *flags, **fields), capture_output=True, text=True, check=False
    )


def stop(workdir, signum, after, **fields):
    """A new process with the command, sent a signal once it has recorded step `after`."""
    process = subprocess.Popen(
        command(workdir, **fields), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and any(line["step"] >= after for line in read_metrics(workdir)):
            process.send_signal(signum)
            break
        time.sleep(0.002)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def contents(workdir):
    return {path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    result = run(workdir)
    assert result.returncode == 0, result.stderr
    assert saved_steps(workdir) == [200, 250, 300]
    assert int(saved(workdir, STEPS)["['step']"]) == STEPS
    assert final(workdir)["status"] == "finished"
    return workdir


@pytest.mark.guarantee("SIGTERM")
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_same_command_goes_on(signum, code, straight, tmp_path):
    stopped = stop(tmp_path, signum, after=20)
    assert stopped.returncode == code, stopped.stderr
    step = saved_steps(tmp_path)[-1]
    assert 20 <= step < STEPS
    assert f"train.py: stopped after step {step} and saved" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "final.json").exists()
    resumed = run(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {step}" in resumed.stdout
    assert differences(tmp_path, straight) == []


@pytest.mark.guarantee("SIGKILL")
def test_a_killed_run_goes_on_from_its_last_checkpoint(straight, tmp_path):
    killed = stop(tmp_path, signal.SIGKILL, after=SAVE + 30)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(tmp_path, straight) == []


def test_a_finished_run_says_so(straight):
    before = contents(straight)
    again = run(straight)
    assert again.returncode == 0
    assert "holds a finished run of 300 steps; nothing to do" in again.stdout
    after = contents(straight)
    plots = {path for path in after if path.suffix in (".png", ".svg", ".pdf")}
    assert after.keys() - plots == before.keys() - plots
    for path in before.keys() - plots:
        assert after[path] == before[path], path


def test_another_config_is_refused_and_nothing_changes(straight):
    before = contents(straight)
    refused = run(straight, **{"optim.learning_rate": 0.5})
    assert refused.returncode == 2
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert line.startswith("train.py: ")
    assert "holds a run of another config (optim.learning_rate: 0.01 -> 0.5)" in line
    assert contents(straight) == before


def test_evaluation_repeats_the_last_one(straight):
    before = contents(straight)
    result = run(straight, "--mode=eval")
    assert result.returncode == 0, result.stderr
    last = read_metrics(straight)[-1]
    expected = {key: value for key, value in last.items() if key.startswith("eval/")}
    assert json.loads(result.stdout) == {"step": STEPS} | expected
    after = contents(straight)
    assert after == before


def test_an_evaluation_may_be_another_one_but_the_training_may_not(straight):
    before = contents(straight)
    result = run(straight, "--mode=eval", **{"eval.batch_size": 100, "data.context": 3})
    assert result.returncode == 0, result.stderr
    last = read_metrics(straight)[-1]
    np.testing.assert_allclose(json.loads(result.stdout)["eval/loss"], last["eval/loss"], rtol=1e-5)
    refused = run(straight, "--mode=eval", **{"optim.learning_rate": 0.5})
    assert refused.returncode == 2
    assert "optim.learning_rate: 0.01 -> 0.5" in refused.stderr
    assert contents(straight) == before


def test_a_workdir_in_use_is_refused_to_another_process(tmp_path):
    held = Workdir(tmp_path, config_with())
    before = contents(tmp_path)
    refused = run(tmp_path)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("train.py: another process is training in")
    assert contents(tmp_path) == before
    del held  # which lets go of the folder
    Workdir(tmp_path, config_with())


# ---- In this process, which computes the same bits


def config_with(**fields):
    return load_config(f"{ROOT / 'configs/mlp.py'}:smoke", settings(**fields))


SHORT = {"train.steps": 40, "checkpoint.every_steps": 10}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of an unbroken run of 40 steps, saved after 20, 30 and 40."""
    workdir = tmp_path_factory.mktemp("short")
    loop.train(config_with(**SHORT), workdir)
    return workdir


@pytest.fixture
def copied(short, tmp_path):
    """The same run, as it stood before it was finished."""
    workdir = tmp_path / "run"
    shutil.copytree(short, workdir)
    (workdir / "final.json").unlink()
    return workdir


def test_what_a_process_killed_at_the_end_left_is_deleted(copied, short):
    # The last checkpoint is written, the one that it replaces not deleted yet.
    shutil.copytree(copied / "checkpoints/20", copied / "checkpoints/10")
    loop.train(config_with(**SHORT), copied)
    assert differences(copied, short) == []


@pytest.mark.parametrize("group", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_the_grouping_of_steps_does_not_change_a_bit(group, short, tmp_path):
    loop.train(config_with(**SHORT, **{"train.steps_per_dispatch": group}), tmp_path)
    assert differences(tmp_path, short) == []


def test_a_run_goes_on_with_another_number_of_devices(copied, short):
    for step in (30, 40):
        shutil.rmtree(copied / "checkpoints" / str(step))
    fields = SHORT | {"train.batch_size": 50, "mesh.data": 2}
    loop.train(config_with(**fields), copied)
    for line, expected in zip(metrics(copied), metrics(short), strict=True):
        assert line.keys() == expected.keys()
        if line["step"] <= 20:
            assert line == expected
        # Sums in another order: see test_sharding.
        np.testing.assert_allclose(line["train/loss"], expected["train/loss"], rtol=1e-5)
    config = json.loads((copied / "config.json").read_text())
    assert config["mesh"]["data"] == 2


def array_files(folder):
    return sorted(path for path in (folder / "state").rglob("d/*") if path.is_file())


def truncate(folder):
    for path in array_files(folder):
        os.truncate(path, path.stat().st_size // 2)


def delete_arrays(folder):
    for path in array_files(folder):
        path.unlink()


def flip_bytes(folder):
    path = max(array_files(folder), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data), len(data) // 8):
        data[at] ^= 0xFF
    path.write_bytes(data)


def delete_metadata(folder):
    (folder / "state" / "_METADATA").unlink()


def delete_record(folder):
    shutil.rmtree(folder / "record")


def garbage_in_record(folder):
    (folder / "record" / "metadata").write_text('{"progress": {')


def other_record(folder):
    (folder / "record" / "metadata").write_text("{}")


def other_digit_in_record(folder):
    """Sound JSON with another number in it, as one flipped bit can make it."""
    path = folder / "record" / "metadata"
    text = path.read_text()
    at = text.index('"eval/loss": ') + len('"eval/loss": 0.')
    path.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def other_numbers(folder):
    """Sound files with other numbers in them: those of the checkpoint before."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / str(int(folder.name) - 10) / "state", folder / "state")


DAMAGES = [
    truncate,
    delete_arrays,
    flip_bytes,
    delete_metadata,
    delete_record,
    garbage_in_record,
    other_record,
    other_digit_in_record,
    empty,
    other_numbers,
]


@pytest.fixture(scope="module")
def program():
    return Trainer.from_config(config_with(**SHORT))


def restore(workdir, program):
    """What Checkpoints restores from a workdir, and its warnings."""
    warned = []
    checkpoints = Checkpoints(workdir / "checkpoints", config_with(**SHORT).checkpoint)
    try:
        return checkpoints.restore(program.shapes, warned.append), warned
    finally:
        checkpoints.close()


def test_the_newest_checkpoint_is_restored_as_it_was_saved(copied, short, program):
    (state, progress), warned = restore(copied, program)
    assert warned == []
    expected = saved(short, 40)
    flat = jax.tree.leaves_with_path(state)
    assert len(flat) == len(jax.tree.leaves(program.shapes))
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
    params = {path for path in expected if path.startswith("['params']")}
    assert len(params) == len(jax.tree.leaves(state["params"]))
    for path in {"['step']", *params}:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    assert progress["last"]["train/loss"] == metrics(short)[-1]["train/loss"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_never_loaded(damage, copied, program):
    damage(copied / "checkpoints" / "40")
    (state, _), (warning,) = restore(copied, program)
    assert int(state["step"]) == 30
    assert "checkpoint 40 is damaged" in warning
    assert str(copied / "damaged" / "40") in warning
    assert "\n" not in warning
    assert saved_steps(copied) == [20, 30]
    assert (copied / "damaged" / "40").is_dir()


def test_a_checkpoint_from_before_there_were_checksums_is_restored(copied, program):
    path = copied / "checkpoints" / "40" / "record" / "metadata"
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(record))
    (state, _), warned = restore(copied, program)
    assert int(state["step"]) == 40
    assert warned == []


@pytest.mark.parametrize("damage", [other_numbers, other_digit_in_record])
def test_whoever_only_reads_finds_damage_too_and_leaves_it(damage, copied, capsys):
    """What can be read, and is not what was saved."""
    (copied / ".lock").unlink()
    damage(copied / "checkpoints" / "40")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.restore(copied / "checkpoints" / "40" / "state")
    before = contents(copied)
    for path in (copied, copied / "checkpoints"):
        path.chmod(0o555)
    try:
        for load in (lambda: load_model(copied)[1], lambda: evaluated(copied)["step"]):
            assert load() == 30
            (warning,) = capsys.readouterr().err.splitlines()
            assert warning.startswith("warning: checkpoint 40 is damaged (")
            assert warning.endswith("); using the one before it")
        with pytest.raises(UserError, match=r"checkpoint 40 in .* is damaged"):
            load_model(copied, 40)
    finally:
        for path in (copied, copied / "checkpoints"):
            path.chmod(0o755)
    assert contents(copied) == before


def evaluated(workdir):
    return loop.evaluate(config_with(**SHORT), workdir)


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        (
            {"model.width": 9},
            r"params/head/kernel: float32\(8, 10\) in .*, float32\(9, 10\)",
        ),
        ({"model.residual": "residual"}, r"params/trunk/blocks/rule/alpha: .*, absent here"),
        ({"optim.name": "adamw"}, r"opt_state/.*/mu/.*: absent in the checkpoint, float32\("),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused_and_stays(fields, difference, copied):
    """As after a change of the code or of a default, of which config.json does not tell."""
    config = config_with(**SHORT, **fields)
    (copied / "config.json").write_text(config.to_json())
    before = contents(copied / "checkpoints")
    for use in (
        lambda: loop.train(config, copied),
        lambda: loop.evaluate(config, copied),
        lambda: load_model(copied),
    ):
        with pytest.raises(UserError, match=r"checkpoint 40 .* model of another structure") as info:
            use()
        assert re.search(difference, str(info.value))
        assert "\n" not in str(info.value)
        assert contents(copied / "checkpoints") == before
        assert not (copied / "damaged").exists()


def test_another_structure_ends_with_status_2(copied):
    (copied / "config.json").write_text(config_with(**SHORT, **{"model.width": 9}).to_json())
    refused = run(copied, **SHORT, **{"model.width": 9})
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("train.py: checkpoint 40 in ")


def test_a_run_from_before_a_field_continues_with_what_it_did(tmp_path):
    numpy, old = tmp_path / "numpy", tmp_path / "old"
    loop.train(config_with(**SHORT, **{"data.order": "numpy"}), numpy)
    shutil.copytree(numpy, old)
    (old / "final.json").unlink()
    for step in (30, 40):
        shutil.rmtree(old / "checkpoints" / str(step))
    config = json.loads((old / "config.json").read_text())
    del config["data"]["order"]
    (old / "config.json").write_text(json.dumps(config))
    assert load_model(old)[2].config.data.order == "numpy"
    loop.train(config_with(**SHORT), old)  # whose own default is another
    assert differences(old, numpy) == []
    assert evaluated(old)["step"] == 40
    again = config_with(**SHORT)
    assert loop.train(again, old)["status"] == "finished"
    assert again.data.order == "hash"  # the caller's config stays as it was


def test_the_stop_signal_is_the_largest_of_the_devices(program):
    _, report = program.dispatch(program.init(), [next(program.batches(0))], stop=15)
    assert report["stop"] == 15


def test_two_damaged_checkpoints(copied, program):
    flip_bytes(copied / "checkpoints" / "40")
    delete_metadata(copied / "checkpoints" / "30")
    (state, _), warned = restore(copied, program)
    assert int(state["step"]) == 20
    assert [text.split(" is damaged")[0] for text in warned] == ["checkpoint 40", "checkpoint 30"]


def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_bits(copied, short, capsys):
    truncate(copied / "checkpoints" / "40")
    loop.train(config_with(**SHORT), copied)
    assert "warning: checkpoint 40 is damaged" in capsys.readouterr().err
    assert differences(copied, short) == []


def test_no_good_checkpoint(copied, program):
    for step in (20, 30, 40):
        truncate(copied / "checkpoints" / str(step))
    restored, warned = restore(copied, program)
    assert restored is None
    assert len(warned) == 4
    assert "no good checkpoint is left" in warned[-1]
    assert saved_steps(copied) == []


@pytest.mark.slow
def test_a_run_with_no_good_checkpoint_says_so_and_starts_anew(copied, short):
    for step in (20, 30, 40):
        truncate(copied / "checkpoints" / str(step))
    result = run(copied, **SHORT)
    assert result.returncode == 0, result.stderr
    for step in (20, 30, 40):
        assert f"checkpoint {step} is damaged" in result.stderr
    assert "no good checkpoint is left" in result.stderr
    assert metrics(copied) == metrics(short)


def test_a_half_written_checkpoint_is_ignored(copied, program):
    folder = copied / "checkpoints"
    shutil.copytree(folder / "40", folder / "50.orbax-checkpoint-tmp")
    shutil.rmtree(folder / "50.orbax-checkpoint-tmp" / "record")
    (state, _), warned = restore(copied, program)
    assert warned == []
    assert int(state["step"]) == 40


@pytest.mark.parametrize("restarts", [(), (4, 6, 9)], ids=["one process", "four processes"])
def test_the_checkpoints_kept_are_the_newest_the_regular_and_the_best(restarts, tmp_path, program):
    config = config_with(
        **{"checkpoint.keep": 2, "checkpoint.keep_every_steps": 4, "checkpoint.keep_best": 1}
    ).checkpoint
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    state = program.init()
    losses = {1: 3.0, 3: 1.0, 5: 2.0, 7: 4.0}
    for step in range(1, 11):
        if step in restarts:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path / "checkpoints", config)
        evaluation = {"eval/loss": losses[step]} if step in losses else None
        checkpoints.save(step, state, {}, evaluation)
    checkpoints.close()
    assert saved_steps(tmp_path) == [3, 4, 8, 9, 10]
