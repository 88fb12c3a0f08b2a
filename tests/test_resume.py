"""Whatever stops a run, the same command resumes it; test_guarantees.py resumes every family."""

import errno
import fcntl
import logging
import os
import random
import re
import shutil
import signal
import sys
import threading

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from rezero_jax.analysis.plots import write_plot
from rezero_jax.config import load_config
from rezero_jax.errors import UserError
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.runs.reader import Run
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training import loop
from rezero_jax.training.load import load_model
from tests.families import FAMILIES, ROOT, STEPS, command, run, stop
from tests.faults import damage
from tests.faults.compare import differences, metrics

MLP = FAMILIES["mlp"]
CONFIG = MLP.load_config()


def contents(workdir):
    return {path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()}


# ---- The same bits


@pytest.mark.guarantee("SIGKILL")
@pytest.mark.guarantee("SIGTERM")
def test_killed_and_stopped_processes_resume_to_the_same_bits(tmp_path):
    fields = {
        "train.epochs": None,
        "train.steps": 300,
        "train.steps_per_dispatch": 7,
        "eval.every_epochs": 2.0,
        "checkpoint.every_steps": 50,
        "log.every_steps": 3,
    }
    workdir, straight = tmp_path / "run", tmp_path / "straight"
    argv = command("mlp.py:smoke", workdir, **fields)
    killed = stop(argv, workdir, signal.SIGKILL, after=80)
    assert killed.returncode == -signal.SIGKILL
    stopped = stop(argv, workdir, signal.SIGTERM, after=160)
    assert stopped.returncode == 143, stopped.stderr
    step = saved_steps(workdir)[-1]
    assert 160 <= step < 300
    assert f"train.py: stopped after step {step} and saved" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (workdir / "final.json").exists()
    resumed = run(argv)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {step}" in resumed.stdout
    assert run(command("mlp.py:smoke", straight, **fields)).returncode == 0
    assert differences(workdir, straight) == []


def test_a_checkpoint_too_many_is_deleted(copy_of, trained):
    """A process that is killed after its last save leaves the checkpoint that it replaces."""
    workdir = copy_of("mlp", STEPS)
    shutil.copytree(workdir / "checkpoints/2", workdir / "checkpoints/1")
    loop.train(CONFIG, workdir)
    assert differences(workdir, trained("mlp")) == []


@pytest.mark.parametrize("group", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_the_grouping_of_steps_does_not_change_a_bit(group, trained, tmp_path):
    loop.train(MLP.load_config(**{"train.steps_per_dispatch": group}), tmp_path)
    assert differences(tmp_path, trained("mlp")) == []


@pytest.mark.devices(2)
def test_a_run_resumes_on_another_number_of_devices(copy_of, trained):
    workdir = copy_of("mlp", 4)
    loop.train(MLP.load_config(**{"mesh.data": 2}), workdir)
    for line, expected in zip(metrics(workdir), metrics(trained("mlp")), strict=True):
        assert line.keys() == expected.keys()
        if line["step"] <= 4:
            assert line == expected
        # Sums in another order: see test_sharding.
        np.testing.assert_allclose(line["train/loss"], expected["train/loss"], rtol=1e-5)


# ---- One run and one start in a workdir


def test_a_finished_run_says_so_and_another_config_is_refused(copy_of, trained, tmp_path, capsys):
    workdir = shutil.copytree(trained("mlp"), tmp_path / "run")
    before = contents(workdir)
    assert loop.train(CONFIG, workdir)["status"] == "finished"
    assert f"holds a finished run of {STEPS} steps; nothing to do" in capsys.readouterr().out
    for folder in (workdir, copy_of("mlp", 4)):
        for field, old, new in (("optim.learning_rate", 0.01, 0.5), ("data.flip", False, True)):
            change = rf"another config \({field}: {old} -> {new}\)"
            with pytest.raises(UserError, match=change):
                loop.train(MLP.load_config(**{field: new}), folder)
    assert contents(workdir) == before


def test_an_evaluation_repeats_the_last_one_unless_its_own_fields_differ(trained):
    workdir = trained("mlp")
    before = contents(workdir)
    last = read_metrics(workdir)[-1]
    expected = {key: value for key, value in last.items() if key.startswith("eval/")}
    assert loop.evaluate(CONFIG, workdir) == {"step": STEPS} | expected
    other = {"eval.batch_size": 50, "data.context": 3}
    loss = loop.evaluate(MLP.load_config(**other), workdir)["eval/loss"]
    np.testing.assert_allclose(loss, last["eval/loss"], rtol=1e-5)
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.01 -> 0.5"):
        loop.evaluate(MLP.load_config(**{"optim.learning_rate": 0.5}), workdir)
    assert contents(workdir) == before


@pytest.mark.guarantee("one start")
def test_a_second_start_is_refused_while_the_first_runs(copy_of):
    workdir = copy_of("mlp", 4)
    first = Workdir(workdir, CONFIG)
    before = contents(workdir)
    with pytest.raises(UserError, match="another process is training in"):
        loop.train(CONFIG, workdir)
    assert contents(workdir) == before
    first.check()
    first.release()
    Workdir(workdir, CONFIG).release()


@pytest.mark.guarantee("one start")
@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_the_newest_start_wins_where_a_file_system_has_no_locks(code, copy_of, monkeypatch):
    def flock(*_):
        raise OSError(code, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    workdir = copy_of("mlp", 4)
    older, newer = Workdir(workdir, CONFIG), Workdir(workdir, CONFIG)
    newer.check()
    with pytest.raises(UserError, match="another start of this run has taken over"):
        older.check()
    for home in (older, newer):
        home.release()


@pytest.mark.parametrize("name", ["a *?{x}[2]%s é\n'q\"", "~", "gs:x"])
def test_a_folder_may_have_any_name(name, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = f"./{name}/"
    shutil.copytree(trained("mlp"), workdir)
    os.unlink(f"{name}/final.json")
    for step in (6, STEPS):
        shutil.rmtree(f"{name}/checkpoints/{step}")
    loop.train(CONFIG, workdir)
    assert differences(tmp_path / name, trained("mlp")) == []
    assert loop.evaluate(CONFIG, workdir)["step"] == load_model(workdir)[1] == STEPS
    assert loop.evaluate(CONFIG, workdir, step=4)["step"] == load_model(workdir, 4)[1] == 4
    untrained = loop.evaluate(CONFIG, workdir, step=0)
    assert untrained["eval/loss"] > loop.evaluate(CONFIG, workdir)["eval/loss"]
    assert os.listdir() == [name]


@pytest.mark.parametrize("name", ["gs:", os.fsdecode(b"\xff")])
def test_a_folder_that_orbax_cannot_write_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"ends with a colon|not UTF-8"):
        Workdir(tmp_path / name, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_home_is_expanded_wherever_a_run_is_named(copy_of, monkeypatch, tmp_path):
    workdir = copy_of("mlp", 4)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(workdir)
    home = Workdir("~/new", CONFIG)
    assert home.folder == tmp_path / "new"
    home.release()
    run = "~/mlp"
    assert saved_steps(run) == [2, 4]
    assert Run.read(run).lines == read_metrics(run) == read_metrics(workdir)
    assert write_plot([run], "~/a.png") == tmp_path / "a.png"
    with pytest.raises(UserError, match="another config"):
        loop.evaluate(MLP.load_config(seed=3), run)
    (tmp_path / "own.py").write_text((ROOT / "configs/mlp.py").read_text())
    assert load_config("~/own.py:smoke").model.name == "mlp"
    assert not (workdir / "~").exists()
    monkeypatch.setattr(os.path, "expanduser", str)  # for users without a home
    with pytest.raises(UserError, match=r"no home folder is known for ~/mlp"):
        loop.train(CONFIG, run)


# ---- Damaged checkpoints


def damaged(workdir, step, kind):
    """Damages the checkpoint of `step`; another checkpoint is the one of the save before."""
    folder = epath.Path(workdir) / "checkpoints"
    kind(folder / str(step), folder / str(step - 2), random.Random(0))


def truncated_arrays(folder, *_):
    for path in damage.files(folder, "state"):
        if path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])


def flipped_bytes(folder, *_):
    path = max(damage.files(folder, "state"), key=lambda path: len(path.read_bytes()))
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data), len(data) // 8):
        data[at] ^= 0xFF
    path.write_bytes(data)


def empty_record(folder, *_):
    (folder / damage.RECORD).write_text("{}")


def empty(folder, *_):
    folder.rmtree()
    folder.mkdir()


DAMAGES = [
    truncated_arrays,
    flipped_bytes,
    empty_record,
    empty,
    damage.flipped_bit_of_record,
    damage.changed_digit_of_progress,
    damage.state_of_another_checkpoint,
    damage.record_of_another_checkpoint,
    damage.half_written,  # without the structure of the state
]


@pytest.fixture(scope="module")
def shapes():
    return MLP.trainer().shapes


def restore(workdir, shapes):
    """What Checkpoints restores from a workdir, and its warnings."""
    warned = []
    with Checkpoints(workdir / "checkpoints", CONFIG.checkpoint) as checkpoints:
        return checkpoints.restore(shapes, warned.append), warned


@pytest.mark.guarantee("damaged checkpoint")
@pytest.mark.parametrize("kind", DAMAGES, ids=damage.name_of)
def test_a_damaged_checkpoint_is_never_loaded(kind, copy_of, shapes):
    workdir = copy_of("mlp", 6)
    damaged(workdir, 6, kind)
    (state, _), (warning,) = restore(workdir, shapes)
    assert int(state["step"]) == 4
    assert "checkpoint 6 is damaged" in warning
    assert str(workdir / "damaged" / "6") in warning
    assert "\n" not in warning
    assert saved_steps(workdir) == [2, 4]
    assert (workdir / "damaged" / "6").is_dir()


def test_without_a_good_checkpoint_the_run_starts_anew(copy_of, shapes):
    workdir = copy_of("mlp", 4)
    for step in (2, 4):
        damaged(workdir, step, truncated_arrays)
    restored, warned = restore(workdir, shapes)
    assert restored is None
    assert [text.split(" is ")[0] for text in warned] == [
        "checkpoint 4",
        "checkpoint 2",
        "no good checkpoint",
    ]
    assert saved_steps(workdir) == []


def process_state():
    """The state of the process that a library must leave alone."""
    loggers = [logging.getLogger(name) for name in ("", "absl", "asyncio", "gcsfs", "jax")]
    return {
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)],
        "loggers": [(logger.level, logger.filters, logger.handlers) for logger in loggers],
        "gs": fsspec.get_filesystem_class("gs"),
        "fsspec": dict(fsspec.config.conf),
        "environment": dict(os.environ),
    }


def test_a_run_with_damaged_checkpoints_ends_with_the_same_bits(copy_of, trained, capsys):
    workdir = copy_of("mlp", 6)
    damaged(workdir, 6, truncated_arrays)
    damaged(workdir, 4, damage.state_of_another_checkpoint)
    before = process_state()
    loop.train(CONFIG, workdir)
    assert process_state() == before
    said = capsys.readouterr()
    for step in (6, 4):
        assert f"warning: checkpoint {step} is damaged" in said.err
    assert "resuming after step 2" in said.out
    assert differences(workdir, trained("mlp")) == []


@pytest.mark.parametrize(
    "kind", [damage.state_of_another_checkpoint, damage.changed_digit_of_progress]
)
def test_whoever_only_reads_finds_damage_too_and_leaves_it(kind, copy_of, capsys):
    """The checkpoint can be read, and is not what was saved."""
    workdir = copy_of("mlp", 6)
    damaged(workdir, 6, kind)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.restore(workdir / "checkpoints" / "6" / "state")
    before = contents(workdir)
    capsys.readouterr()
    for path in (workdir, workdir / "checkpoints"):
        path.chmod(0o555)
    try:
        for load in (load_model, lambda workdir: (None, loop.evaluate(CONFIG, workdir)["step"])):
            assert load(workdir)[1] == 4
            (warning,) = capsys.readouterr().err.splitlines()
            assert warning.startswith("warning: checkpoint 6 is damaged (")
            assert warning.endswith("); using the one before it")
        with pytest.raises(UserError, match=r"checkpoint 6 in .* is damaged"):
            load_model(workdir, 6)
    finally:
        for path in (workdir, workdir / "checkpoints"):
            path.chmod(0o755)
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"model.residual": "residual"}, r"params/trunk/blocks/rule/alpha: .*, absent here"),
        ({"optim.name": "adamw"}, r"opt_state/.*/mu/.*: absent in the checkpoint, float32\("),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused_and_stays(fields, difference, copy_of):
    """As after a change of the code, which config.json does not record."""
    workdir = copy_of("mlp", 4)
    config = MLP.load_config(**fields)
    (workdir / "config.json").write_text(config.to_json())
    before = contents(workdir / "checkpoints")
    for use in (
        lambda: loop.train(config, workdir),
        lambda: loop.evaluate(config, workdir),
        lambda: load_model(workdir),
    ):
        with pytest.raises(UserError, match=r"checkpoint 4 .* model of another structure") as info:
            use()
        assert re.search(difference, str(info.value))
        assert "\n" not in str(info.value)
        assert contents(workdir / "checkpoints") == before
        assert not (workdir / "damaged").exists()


def test_a_half_written_checkpoint_is_removed(copy_of, shapes):
    workdir = copy_of("mlp", 6)
    unfinished = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "6", unfinished)
    shutil.rmtree(unfinished / "record")
    (state, _), warned = restore(workdir, shapes)
    assert warned == []
    assert int(state["step"]) == 6
    assert not unfinished.exists()


@pytest.mark.parametrize("restarts", [(), (4, 6, 9)], ids=["one process", "four processes"])
def test_the_checkpoints_kept_are_the_newest_the_regular_and_the_best(restarts, tmp_path):
    config = MLP.load_config(
        **{"checkpoint.keep": 2, "checkpoint.keep_every_steps": 4, "checkpoint.keep_best": 1}
    ).checkpoint
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    state = {"x": jax.numpy.zeros(3)}
    losses = {1: 3.0, 3: 1.0, 5: 2.0, 7: 4.0}
    for step in range(1, 11):
        if step in restarts:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path / "checkpoints", config)
        evaluation = {"eval/loss": losses[step]} if step in losses else None
        checkpoints.save(step, state, {}, evaluation)
    checkpoints.close()
    assert saved_steps(tmp_path) == [3, 4, 8, 9, 10]
