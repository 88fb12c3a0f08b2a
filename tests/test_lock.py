"""A lease lets one run in, and lets the next one in when its holder has ended, however it ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorstore as ts

from rezero_jax import runs
from rezero_jax.config import base_config
from rezero_jax.errors import UserError
from rezero_jax.runs import lock
from rezero_jax.runs.folder import Workdir
from rezero_jax.runs.lock import Lock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that TensorStore writes as it writes a bucket, with little patience."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.5)
    return f"file://{tmp_path}"


def held_by(folder: str) -> dict | None:
    found = ts.KvStore.open(f"{folder}/").result().read(lock.NAME).result()
    return json.loads(found.value) if found.value else None


def test_a_second_run_is_refused_while_the_first_lives(folder: str) -> None:
    first = Lock(folder)
    with pytest.raises(UserError, match="another process is training in"):
        Lock(folder)
    first.release()
    assert held_by(folder) is None
    Lock(folder).release()


def test_the_lock_of_a_run_that_was_copied_from_a_disk_is_free(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ts.KvStore.open(f"{folder}/").result().write(lock.NAME, b"").result()
    Lock(folder).release()
    assert "waiting" not in capsys.readouterr().err


def test_a_second_run_on_another_machine_is_refused_at_a_sign_of_life(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_this_process", lambda: {"boot": "another machine"})
        first = Lock(folder)
    with pytest.raises(UserError, match="another process is training in"):
        Lock(folder)
    first.release()


def test_a_lease_is_free_when_its_holder_of_another_machine_is_silent(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_this_process", lambda: {"boot": "another machine"})
        patch.setattr(lock, "BEAT", 1e6)
        gone = Lock(folder)
    before = held_by(folder)
    now = Lock(folder)
    assert held_by(folder)["id"] != before["id"]
    assert "waiting" in capsys.readouterr().err
    now.release()
    gone.release()  # is not its to delete, and deletes nothing
    Lock(folder).release()


def test_a_lease_of_a_killed_process_of_this_machine_is_free_at_once(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        f"import os; from rezero_jax.runs.lock import Lock; held = Lock({folder!r}); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert held_by(folder) is not None
    Lock(folder).release()
    assert "waiting" not in capsys.readouterr().err


def test_a_holder_whose_lease_another_took_ends(folder: str, tmp_path: Path) -> None:
    program = f"""
import time
from rezero_jax.runs import lock
lock.BEAT = 0.05
held = lock.Lock({folder!r})
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    ts.KvStore.open(f"{folder}/").result().write(lock.NAME, b'{"id": "another"}').result()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "another process is training in" in told


def test_a_write_whose_answer_is_lost_keeps_the_lease(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 1e6)
    held = Lock(folder)
    lease = held._holder
    store = lease._store

    class Lossy:
        """Makes each conditional write twice, as TensorStore does after a lost answer."""

        read = store.read

        def write(self, key, value, if_equal):
            store.write(key, value, if_equal=if_equal).result()
            return store.write(key, value, if_equal=if_equal)

    lease._store = Lossy()
    assert lease._beat()
    assert lease._beat()
    lease._store = store
    held.release()
    assert held_by(folder) is None


def test_a_mistake_in_the_code_is_not_called_one_of_the_workdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.folder, "Lock", lambda folder: None.missing)
    with pytest.raises(AttributeError):
        Workdir(tmp_path, base_config())
