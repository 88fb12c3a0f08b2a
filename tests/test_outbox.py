"""The local folder of a run in a bucket goes with its process, or else at the next start."""

import os
import tempfile
from pathlib import Path

import pytest

from rezero_jax.runs.outbox import PREFIX, Outbox


def test_only_folders_that_no_process_holds_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, young, foreign = (tmp_path / name for name in (f"{PREFIX}1", f"{PREFIX}2", "other"))
    first = Outbox("gs://runs/a")
    for folder in (abandoned, young, foreign):
        folder.mkdir()
    (abandoned / "metrics.jsonl").touch()
    for folder in (abandoned, foreign, first.folder):
        os.utime(folder, (0, 0))
    second = Outbox("gs://runs/b")
    kept = {young, foreign, first.folder, second.folder}
    assert set(tmp_path.iterdir()) == kept
    for outbox in (first, second):
        outbox.close()
    assert set(tmp_path.iterdir()) == {young, foreign}
