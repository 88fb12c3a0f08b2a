"""Requests to a bucket outlast what passes, and end at once where another try cannot help."""

import os
import signal
import sys
import threading
import time

import jax.numpy as jnp
import pytest
from aiohttp import (
    ClientPayloadError,
    ClientTimeout,
    ServerDisconnectedError,
    SocketTimeoutError,
)
from etils import epath
from gcsfs.retry import HttpError
from google.auth.exceptions import RefreshError, TransportError

from rezero_jax.config import base_config
from rezero_jax.errors import Unavailable, first_line
from rezero_jax.runs import cloud_storage, files, restore
from rezero_jax.runs.checkpoint import Checkpoints
from tests.gcs.faults import Faults

PATH = epath.Path("gs://runs/folder/file")


class Failing(Faults):
    """The first `times` requests meet one kind of fault, and no other does."""

    def __init__(self, kind, times):
        super().__init__(0.0)
        self.kind, self.times = kind, times

    def draw(self):
        self.times -= 1
        return self.kind if self.times >= 0 else None


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cloud_storage, "LONGEST_PAUSE", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [kind for kind in Faults.KINDS if kind != "stall"])
def test_files_are_written_listed_read_and_deleted_however_often_a_request_fails(
    kind, server, monkeypatch
):
    def failing(times=10):
        monkeypatch.setattr(server, "faults", Failing(kind, times))

    failing()
    files.replace_file(PATH, "text")
    assert server.faults.times < 0
    failing()
    assert list(PATH.parent.iterdir()) == [PATH]
    failing()
    assert PATH.read_text() == "text"
    failing()
    PATH.unlink()
    failing()
    assert not PATH.exists()


def test_an_answer_that_does_not_come_is_asked_for_again(server, monkeypatch):
    storage = epath.backend.fsspec_backend.fs(PATH)
    assert storage.requests_timeout == cloud_storage.TIMEOUT
    monkeypatch.setattr(storage, "requests_timeout", ClientTimeout(sock_read=0.1))
    faults = Failing("stall", 1)
    monkeypatch.setattr(faults, "stall", lambda: time.sleep(3.0))
    monkeypatch.setattr(server, "faults", faults)
    began = time.monotonic()
    files.replace_file(PATH, "late")
    assert time.monotonic() - began < 2.5
    assert PATH.read_text() == "late"


@pytest.mark.usefixtures("quick")
def test_a_long_outage_fails_all_requests_at_once_until_one_is_answered(server, monkeypatch, capfd):
    monkeypatch.setattr(cloud_storage, "PATIENCE", 0.3)
    monkeypatch.setattr(cloud_storage, "SILENT", 0.1)
    faults = Failing("cut the answer", 10**6)
    monkeypatch.setattr(server, "faults", faults)
    began = time.monotonic()
    with pytest.raises(ClientPayloadError):
        files.replace_file(PATH, "text")
    assert time.monotonic() - began > 0.3
    before = faults.times
    with pytest.raises(ClientPayloadError):
        files.replace_file(PATH, "text")
    assert faults.times == before - 1
    assert capfd.readouterr().err.count("Cloud Storage fails (Response payload is not") == 1
    monkeypatch.setattr(server, "faults", Failing("busy", 0))
    with pytest.raises(FileNotFoundError):
        epath.backend.fsspec_backend.fs(PATH).cat_file("runs/absent")
    monkeypatch.setattr(server, "faults", Failing("busy", 3))
    files.replace_file(PATH, "text")


def test_a_wait_can_be_interrupted(server, monkeypatch):
    monkeypatch.setattr(server, "faults", Failing("refuse", 10**6))
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            PATH.exists()
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (HttpError({"code": 503}), "PATIENCE"),
        (HttpError({"code": 429}), "PATIENCE"),
        (HttpError({"code": 408}), "PATIENCE"),
        (SocketTimeoutError(), "PATIENCE"),
        (ServerDisconnectedError(), "PATIENCE"),
        (TransportError(), "PATIENCE"),
        (HttpError({"code": 401, "message": "Invalid Credentials"}), "CREDENTIALS_PATIENCE"),
        (RefreshError(), "CREDENTIALS_PATIENCE"),
        (HttpError({"code": 401, "message": "Anonymous caller"}), None),
        (HttpError({"code": 400}), None),
        (FileNotFoundError(), None),
        (FileExistsError(), None),  # of a precondition
        (OSError("Forbidden"), None),
    ],
)
def test_only_what_passes_is_waited_for(error, kind):
    assert cloud_storage.patience(error) == (getattr(cloud_storage, kind) if kind else 0.0)


@pytest.mark.parametrize(
    "error",
    [
        ClientPayloadError("not completed"),
        ValueError("UNAVAILABLE: Error reading"),
        FileNotFoundError("metadata"),
    ],
    ids=["gcsfs", "tensorstore", "absent"],
)
def test_a_checkpoint_that_an_outage_hides_is_not_called_damaged(error, monkeypatch, tmp_path):
    moved = []

    def fail(*_):
        raise error

    monkeypatch.setattr(restore, "_load", fail)
    monkeypatch.setattr(restore, "saved_steps", lambda _: [5])
    in_bucket, on_disk = epath.Path("gs://runs/run/checkpoints"), epath.Path(tmp_path)
    if isinstance(error, FileNotFoundError):  # an answer
        assert restore.read_newest(in_bucket, {}, warn=moved.append, set_aside=str) is None
        assert "checkpoint 5 is damaged" in moved[0]
        return
    with pytest.raises(Unavailable, match="the bucket does not answer") as raised:
        restore.read_newest(in_bucket, {}, set_aside=moved.append)
    assert raised.value.status == 4
    assert not moved
    # The same error of a file on the disk is one of its content.
    assert restore.read_newest(on_disk, {}, warn=moved.append, set_aside=str) is None
    assert "checkpoint 5 is damaged" in moved[0]


def test_a_save_that_an_outage_ends_is_told_as_an_outage(monkeypatch, tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path) / "checkpoints", base_config().checkpoint)

    def failed(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(OSError, match=first_line(error)) as raised:
            checkpoints.save(1, {"x": jnp.zeros(1)}, {}, None)
        return raised.value

    assert files.is_outage(PATH, failed(ServerDisconnectedError()))
    assert files.is_outage(PATH, failed(HttpError({"code": 503, "message": "try again"})))
    assert not files.is_outage(PATH, failed(HttpError({"code": 403, "message": "Forbidden"})))
    assert not files.is_outage(tmp_path, failed(ServerDisconnectedError()))


def test_reads_of_a_damaged_checkpoint_that_end_late_print_nothing(monkeypatch, tmp_path):
    class Raises:
        def __init__(self, text):
            self.text = text

        def __del__(self):
            raise RuntimeError(self.text)

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(str(args.exc_value)))
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(str(error)))
    for _ in range(2):
        with pytest.raises(restore.Damaged):
            restore.read(epath.Path(tmp_path), 5, {})
        for text in (
            "Event loop is closed",
            "Encountered error while reading array index: (slice(0, 64, 1),)",
            "another",
        ):
            Raises(text)
            sys.excepthook(RuntimeError, RuntimeError(text), None)
    assert told == ["another"] * 4


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("home", ["gs://runs/unfinished", "disk"])
def test_what_a_killed_save_left_is_removed_before_a_checkpoint_can_be_moved(
    home, monkeypatch, tmp_path
):
    folder = (epath.Path(home) if "://" in home else epath.Path(tmp_path)) / "checkpoints"
    mark = "" if "://" in home else ".orbax-checkpoint-tmp"
    for name in ("20/record/metadata", "20/commit_success.txt", f"30{mark}/record/metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    found = []
    monkeypatch.setattr(
        Checkpoints, "_open", lambda self: found.extend(path.name for path in folder.iterdir())
    )
    for _ in range(2):
        Checkpoints(folder, base_config().checkpoint)
    assert found == ["20", "20"]
