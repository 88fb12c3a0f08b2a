"""A run that can no longer write says so in one sentence, and loses nothing that was saved."""

import contextlib
import errno
import functools
import io
import os
import random
import shutil
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from jax.errors import JaxRuntimeError

from launch import flags
from rezero_jax import processes
from rezero_jax.analysis.plots import write_plot
from rezero_jax.data import Dataset
from rezero_jax.data.stream import StreamSplit
from rezero_jax.errors import UserError
from rezero_jax.runs import restore
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.files import path_of, write_json
from rezero_jax.runs.folder import read_environment, read_final, recorded_data
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.runs.reader import Run
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training import loop
from tests.families import FAMILIES, STEPS, command, run
from tests.faults.compare import changed_arrays, differences, saved

MLP = FAMILIES["mlp"]
CONFIG = MLP.load_config()


@functools.cache
def shapes():
    return MLP.trainer().shapes


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_same_command_resumes(tmp_path):
    whole, full = tmp_path / "whole", tmp_path / "full"
    fields = {"train.epochs": None, "train.steps": 60, "checkpoint.every_steps": 20}
    assert run(command("mlp.py:depth=2,width=256", whole, **fields)).returncode == 0
    shutil.copytree(whole, full)
    (full / "final.json").unlink()
    for step in (40, 60):
        shutil.rmtree(full / "checkpoints" / str(step))
    argv = command("mlp.py:depth=2,width=256", full, **fields)
    result = run(["bash", "-c", 'ulimit -f 100 && exec "$@"', "-", *argv])
    assert result.returncode == 2
    (said,) = (line for line in result.stderr.splitlines() if line.startswith("train.py:"))
    assert "cannot write to the workdir" in said
    assert [path.name for path in (full / "checkpoints").iterdir() if path.name.isdigit()] == ["20"]
    assert not (full / "final.json").exists()
    assert run(argv).returncode == 0
    assert changed_arrays(saved(whole, 60), saved(full, 60)) == []


def test_a_disk_without_room_is_reported_before_it_is_full(tmp_path, monkeypatch):
    found = shutil.disk_usage(tmp_path)
    free = iter([found.free, 100])  # at the second save

    def usage(folder):
        assert Path(folder).is_relative_to(tmp_path)
        return found._replace(free=next(free))

    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(UserError, match=r"\(a checkpoint needs 0\.3 MB, and 0\.0 MB are free\)"):
        loop.train(CONFIG, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


# A thread of Orbax may report the failed write once more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_workdir_that_vanishes_is_reported(tmp_path):
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def stop():
        if (workdir / "checkpoints" / "2").exists():
            workdir.rename(elsewhere)
            workdir.write_text("")  # no folder, and none can be made
        return 0

    with pytest.raises(UserError, match="cannot write to the workdir"):
        loop.train(MLP.load_config(**{"train.steps_per_dispatch": 1}), workdir, stop=stop)
    assert (elsewhere / "checkpoints" / "2").is_dir()
    assert read_metrics(elsewhere)


def test_a_process_lost_while_saving_is_not_a_failed_write(tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise JaxRuntimeError("Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(JaxRuntimeError, match="closed by peer"):
        loop.train(CONFIG, tmp_path)


def test_nothing_waits_for_the_save_of_a_lost_process(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CONFIG.checkpoint)
    monkeypatch.setattr(checkpoints._manager, "close", pytest.fail)
    checkpoints.__exit__(processes.Lost, processes.Lost("lost"), None)


# ---- Traces


@pytest.mark.slow
def test_a_trace_of_some_updates(tmp_path):
    loop.train(CONFIG, tmp_path, profile=(4, 5))
    names = [path.name for path in (tmp_path / "profile").rglob("*")]
    assert "perfetto_trace.json.gz" in names
    assert any(name.endswith(".xplane.pb") for name in names)


def test_an_invalid_range_of_a_trace_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=f"last step .* {STEPS}"):
        loop.train(CONFIG, tmp_path / "run", profile=(STEPS - 2, STEPS + 1))
    assert list(tmp_path.iterdir()) == []
    for text in ("", "20:10", "0:5", "a:b"):
        with pytest.raises(SystemExit):
            flags.parse(["--config=a.py", "--workdir=b", f"--profile_steps={text}"])
        assert "FIRST:LAST" in capsys.readouterr().err


# ---- The surroundings


def test_a_clock_that_jumps_by_years_stops_nothing(trained, tmp_path, monkeypatch):
    real, draw = time.time, random.Random(0)
    monkeypatch.setattr("time.time", lambda: real() + draw.choice((-1.7e9, 0.0, 1.7e9)))
    loop.train(CONFIG, tmp_path)
    assert differences(tmp_path, trained("mlp")) == []


def test_output_that_cannot_be_written_stops_nothing(trained, tmp_path, monkeypatch):
    """As in `train | head -1`, or once the terminal is closed."""

    class Lost(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Lost())
    monkeypatch.setattr("sys.stderr", None)
    loop.train(CONFIG, tmp_path)
    assert differences(tmp_path, trained("mlp")) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard/events", "final.json"])
def test_a_disk_that_fills_at_any_write_is_reported(name, trained, tmp_path, monkeypatch):
    """The third write to one of the files fails, and the run goes on once there is room."""
    written = []

    class Full(io.FileIO):
        def write(self, data):
            written.append(data)
            if len(written) > 2 or name == "final.json":
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def opened(path, mode="r", *args, **options):
        if ("b" not in mode and "a" not in mode) or not str(path).startswith(str(tmp_path)):
            return real(path, mode, *args, **options)
        if name.split("/")[0].split(".")[0] not in str(path):
            return real(path, mode, *args, **options)
        file = io.BufferedWriter(Full(path, mode.replace("b", "")))
        return file if "b" in mode else io.TextIOWrapper(file)

    real = io.open
    with monkeypatch.context() as patch:
        patch.setattr("io.open", opened)
        patch.setattr("builtins.open", opened)
        with pytest.raises(UserError, match=r"cannot write to the workdir .*No space left"):
            loop.train(CONFIG, tmp_path)
    loop.train(CONFIG, tmp_path)
    assert differences(tmp_path, trained("mlp")) == []


def test_data_that_cannot_be_read_are_not_called_the_workdir(tmp_path):
    class Source:
        def __len__(self):
            return 100

        def __getitems__(self, keys):
            raise OSError(errno.EIO, "Input/output error", "/data/shard")

    split = StreamSplit(Source(), name="mine")
    dataset = Dataset("mine", split, split, (8, 8, 1), 10, (0.5,), (0.5,))
    with pytest.raises(UserError, match=r'data set "mine.*cannot be read .*/data/shard'):
        loop.train(CONFIG, tmp_path, dataset=dataset)


def test_a_run_that_deletes_its_checkpoints_is_read(copy_of, monkeypatch):
    """With checkpoint.keep=1, a checkpoint may be gone when the reader comes to it."""
    workdir = copy_of("mlp", 8)
    (workdir / "checkpoints" / "8").rename(workdir / "8")
    real, warned = restore.read, []

    def read(folder, step, shapes):
        if step == 6:  # the run saves checkpoint 8, and deletes the others
            (workdir / "8").rename(workdir / "checkpoints" / "8")
            for older in (2, 4, 6):
                shutil.rmtree(workdir / "checkpoints" / str(older))
        return real(folder, step, shapes)

    monkeypatch.setattr(restore, "read", read)
    found = restore.read_newest(path_of(workdir / "checkpoints"), shapes(), warned.append)
    assert int(found[0]["step"]) == 8
    assert warned == []


# ---- Links, pipes and other contents of a stranger's folder


LINKS = (".lock", "config.json", "final.json", "metrics.jsonl", "curves.png")
FOLDERS = ("checkpoints", "checkpoints/4", "checkpoints/9", "damaged", "tensorboard")


@pytest.mark.parametrize("name", [*LINKS, *FOLDERS])
def test_a_link_in_a_run_folder_is_never_written_through(name, copy_of, tmp_path):
    workdir, outside = copy_of("mlp", 4), tmp_path / "outside"
    link, target = workdir / name, outside / Path(name).name
    outside.mkdir()
    if link.exists():
        shutil.move(link, target)
    elif name in FOLDERS:
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.write_text("mine")
    link.symlink_to(target)
    before = {path: path.is_file() and path.read_bytes() for path in outside.rglob("*")}
    if name in (".lock", *FOLDERS):
        with pytest.raises(UserError, match=f"{name} is a link"):
            loop.train(CONFIG, workdir)
    else:
        with contextlib.suppress(UserError):  # final.json is not one of a run
            loop.train(CONFIG, workdir)
        write_plot([workdir])
    assert {path: path.is_file() and path.read_bytes() for path in outside.rglob("*")} == before
    assert not target.is_dir() or link.is_symlink()


def test_a_workdir_may_be_a_link_and_leftovers_are_removed(copy_of, trained, tmp_path):
    workdir = copy_of("mlp", 4)
    (tmp_path / "link").symlink_to(workdir)
    left = workdir / f".config.json.{'0' * 32}.tmp"
    left.write_text("{")
    loop.train(CONFIG, tmp_path / "link")
    assert not left.exists()
    assert differences(workdir, trained("mlp")) == []


RECORDS = ("config.json", "environment.json", "final.json", "metrics.jsonl", "data.json", ".lock")
CONTENTS = (b"\xff\xfe{", bytes(99), b'{"a":' + b"[" * 99999, b"[]", b"{}")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_is_a_pipe_a_folder_or_broken_is_a_sentence(name, copy_of, tmp_path):
    workdir = copy_of("mlp", 4)
    path = workdir / name

    def check():
        claim = functools.partial(Workdir, config=CONFIG)
        for use in (Run.read, read_final, recorded_data, read_metrics, read_environment, claim):
            with contextlib.suppress(UserError):
                found = use(workdir)
                if use is claim:
                    found.release()

    def made(make, *args):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(*args)
        check()

    made(os.mkfifo, path)
    made(path.mkdir)
    for target in ("/dev/zero", "/nowhere", path):
        made(path.symlink_to, target)
    for content in CONTENTS:
        made(path.write_bytes, content)
    with path.open("ab") as file:
        file.truncate(10**11)
    check()
    (workdir / "checkpoints" / "4" / "state" / "manifest.ocdbt").unlink()
    os.mkfifo(workdir / "checkpoints" / "4" / "state" / "manifest.ocdbt")
    warned = []
    found = restore.read_newest(path_of(workdir / "checkpoints"), shapes(), warned.append)
    assert int(found[0]["step"]) == 2
    assert "checkpoint 4 is damaged (it is not a file)" in warned[0]


def test_a_final_record_has_its_fields(trained, tmp_path):
    final = read_final(trained("mlp"))
    for key in final:
        for value in (None, "x" if key != "status" else 1, [], {}):
            write_json(tmp_path / "final.json", final | {key: value})
            with pytest.raises(UserError, match=rf"final.json is broken .*{key}"):
                read_final(tmp_path)
        if key in ("status", "steps", "seconds"):
            write_json(tmp_path / "final.json", {k: v for k, v in final.items() if k != key})
            with pytest.raises(UserError, match=f"{key} is missing"):
                read_final(tmp_path)
