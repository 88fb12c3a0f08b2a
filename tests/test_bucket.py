"""A workdir in a bucket: the bits of a run on a disk, one start at a time, errors in a sentence."""

import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest
from aiohttp import ClientPayloadError, ServerDisconnectedError, SocketTimeoutError
from etils import epath
from flax import nnx
from gcsfs.retry import HttpError as GcsError
from google.auth.exceptions import RefreshError, TransportError

import rezero_jax
from rezero_jax.analysis.plots import write_plot
from rezero_jax.config import base_config
from rezero_jax.errors import Unavailable, UserError, first_line
from rezero_jax.export import export
from rezero_jax.runs import files, restore
from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.metrics import MetricsWriter, read_metrics
from rezero_jax.runs.moving import copy_folder
from rezero_jax.runs.workdir import Workdir
from rezero_jax.training import loop
from tests.families import FAMILIES, assert_trees_close
from tests.faults.compare import differences
from tests.gcs.faults import Faults
from tests.gcs.store import Refused

CONFIG = FAMILIES["mlp"].load_config()


@pytest.fixture
def copied(trained, server, request):
    """Copies the tiny run of the MLP into the bucket, as it was after step 6."""
    folder = epath.Path(f"gs://runs/{request.node.name}")
    copy_folder(epath.Path(trained("mlp")), folder)
    (folder / "final.json").unlink()
    (folder / "checkpoints/8").rmtree()
    return folder


@pytest.mark.guarantee("bucket")
def test_a_run_in_a_bucket_has_the_bits_of_one_on_a_disk(server, trained):
    folder = epath.Path("gs://runs/whole")
    loop.train(CONFIG, folder)
    assert differences(folder, trained("mlp")) == []
    assert loop.evaluate(CONFIG, folder) == loop.evaluate(CONFIG, trained("mlp"))
    assert write_plot([folder]) == folder / "curves.png"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    models = (folder / "model", Path(trained("mlp"), "model"))
    for run, model in zip((folder, trained("mlp")), models, strict=True):
        export(str(run), str(model))
    states = [nnx.state(rezero_jax.load(model)) for model in models]
    assert_trees_close(*states, rtol=0)


@pytest.mark.slow
def test_it_resumes_although_a_save_was_killed_and_requests_fail(
    copied, trained, server, monkeypatch, capsys
):
    (copied / "checkpoints/6/commit_success.txt").unlink()
    assert saved_steps(copied) == [2, 4]
    monkeypatch.setattr(server, "faults", Faults(0.03, stall=0.1))
    loop.train(CONFIG, copied)
    assert sum(server.faults.count.values()) > 3
    assert "resuming after step 4" in capsys.readouterr().out
    monkeypatch.setattr(server, "faults", Faults(0.0))
    assert differences(copied, trained("mlp")) == []


@pytest.mark.slow
def test_an_outage_ends_the_run_and_the_same_call_resumes(copied, trained, server, monkeypatch):
    def stop():
        monkeypatch.setattr(server, "faults", Faults(1.0))
        monkeypatch.setattr(server.faults, "KINDS", ("cut the request",))
        return 0

    began = time.monotonic()
    with pytest.raises(Unavailable, match="gs://runs does not answer") as info:
        loop.train(CONFIG, copied, stop=stop)
    assert info.value.status == 4
    assert time.monotonic() - began < 300
    monkeypatch.setattr(server, "faults", Faults(0.0))
    loop.train(CONFIG, copied)
    assert differences(copied, trained("mlp")) == []


# ---- The newest start wins


@pytest.mark.guarantee("bucket")
def test_an_older_start_stops_and_writes_nothing_more(copied, server):
    newer = []

    def contents():
        return {
            name: found.generation
            for name, found in server.store.bucket("runs").items()
            if name.startswith(f"{copied.name}/")
        }

    def stop():
        if not newer:
            newer.append(Workdir(copied, CONFIG))
            newer.append(contents())
        return 0

    with pytest.raises(UserError, match=r"another start .* has taken over gs://runs") as info:
        loop.train(CONFIG, copied, stop=stop)
    assert info.value.status == 2
    assert contents() == newer[1]
    newer[0].check()


@pytest.mark.guarantee("bucket")
def test_a_save_does_not_commit_once_a_newer_start_has_claimed_the_folder(copied, monkeypatch):
    older = Workdir(copied, CONFIG)
    checkpoints = Checkpoints(copied / "checkpoints", CONFIG.checkpoint, older.check)
    save = checkpoints._manager.save

    def claim_while_saving(*args, **options):
        Workdir(copied, CONFIG)
        return save(*args, **options)

    monkeypatch.setattr(checkpoints._manager, "save", claim_while_saving)
    checkpoints.save(8, {"x": jnp.zeros(1)}, {}, None)
    with pytest.raises(UserError, match="has taken over"):
        checkpoints.close()
    assert saved_steps(copied) == [2, 4, 6]


def test_lines_are_uploaded_while_the_run_trains_unless_a_newer_start_has_claimed(copied):
    older = Workdir(copied, CONFIG)
    writer = MetricsWriter(copied, 6, older.check)
    writer.write(7, {"train/loss": 0.5})
    writer._upload._next = 0.0  # a second later
    writer.write(8, {"train/loss": 0.5})
    assert read_metrics(copied)[-1]["step"] == 8
    Workdir(copied, CONFIG)
    writer._upload._next = 0.0
    with pytest.raises(UserError, match="has taken over"):
        writer.write(9, {"train/loss": 0.5})
    with pytest.raises(UserError, match="has taken over"):
        writer.close()
    assert read_metrics(copied)[-1]["step"] == 8
    assert not writer._upload.folder.exists()


def test_the_server_replaces_an_object_only_if_it_has_the_generation_given(server):
    """The rule of Cloud Storage that claims and saves rely on."""
    store, stale = server.store, "0"
    for content in (b"1", b"2"):
        generation = str(store.put("runs", "a", content, stale).generation)
        for change in (partial(store.put, "runs", "a", b"3"), partial(store.delete, "runs", "a")):
            with pytest.raises(Refused):
                change(stale)
        assert store.get("runs", "a").content == content
        stale = generation
    store.delete("runs", "a", generation)


# ---- Errors


def test_a_bucket_that_cannot_be_reached_is_reported_within_ten_seconds(monkeypatch):
    assert files.PATIENCE < 10
    monkeypatch.setattr(files, "PATIENCE", 1.0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:9")
    began = time.monotonic()
    with pytest.raises(Unavailable, match="gs://runs does not answer") as info:
        loop.train(CONFIG, "gs://runs/run")
    assert time.monotonic() - began < 5
    assert info.value.status == 4


def test_a_bucket_that_refuses_is_one_sentence(server, monkeypatch):
    with pytest.raises(UserError, match="cannot use gs://none: there is no such bucket; make it"):
        loop.train(CONFIG, "gs://none/run")
    for methods, status, said in (
        ("GET POST", 401, "no valid credentials"),
        ("GET POST", 403, "no permission"),
        ("POST", 403, "no permission"),
    ):
        monkeypatch.setattr(server, "refusals", dict.fromkeys(methods.split(), status))
        with pytest.raises(UserError, match=f"cannot use gs://runs: {said}") as info:
            loop.train(CONFIG, "gs://runs/refused")
        assert info.value.status == 2
    monkeypatch.setattr(server, "refusals", {})

    def stop():
        refusals = dict.fromkeys(("GET", "POST", "PUT", "DELETE"), 403)
        monkeypatch.setattr(server, "refusals", refusals)
        return 0

    with pytest.raises(UserError, match="cannot use gs://runs: no permission"):
        loop.train(CONFIG, "gs://runs/lost", stop=stop)


def test_an_outage_is_told_from_an_answer():
    of_tensorstore = ValueError("UNAVAILABLE: Error reading")
    kinds = (SocketTimeoutError, ServerDisconnectedError, TransportError, RefreshError)
    errors = [kind() for kind in (*kinds, TimeoutError, ConnectionResetError)]
    for error in (GcsError({"code": 503}), GcsError({"code": 429}), of_tensorstore, *errors):
        assert files.is_outage("gs://runs/x", error), error
        assert not files.is_outage("/disk/x", error), error
    answers = (FileNotFoundError(), FileExistsError(), OSError("Forbidden"))
    for error in (GcsError({"code": 400}), *answers):
        assert not files.is_outage("gs://runs/x", error), error


def test_a_checkpoint_that_an_outage_hides_is_not_called_damaged(monkeypatch, tmp_path):
    moved, warned = [], []
    folder = epath.Path("gs://runs/run/checkpoints")
    monkeypatch.setattr(restore, "saved_steps", lambda _: [5])

    def fail_with(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(restore, "_load", fail)

    fail_with(ClientPayloadError("not completed"))
    with pytest.raises(Unavailable, match=r"gs://runs does not answer \(checkpoint 5"):
        restore.read_newest(folder, {}, set_aside=moved.append)
    assert not moved
    # The same error of a file on a disk, or an answer of the bucket, is about the content.
    restore.read_newest(epath.Path(tmp_path), {}, warn=warned.append, set_aside=str)
    fail_with(FileNotFoundError("metadata"))
    restore.read_newest(folder, {}, warn=warned.append, set_aside=str)
    assert [text.split(" (")[0] for text in warned] == ["checkpoint 5 is damaged"] * 2


def test_a_save_that_an_outage_ends_is_reported_as_an_outage(monkeypatch, tmp_path):
    checkpoints = Checkpoints(Path(tmp_path) / "checkpoints", base_config().checkpoint)
    for error in (GcsError({"code": 503, "message": "try again"}), OSError("Forbidden")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(UserError, match=first_line(error)) as raised:
            checkpoints.save(1, {"x": jnp.zeros(1)}, {}, None)
        assert files.is_outage("gs://runs/x", raised.value) == isinstance(error, GcsError)
