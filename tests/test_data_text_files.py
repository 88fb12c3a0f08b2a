"""Text files: a folder in the order of its paths, the standard library, and enwik8 by its hash."""

import hashlib
import io
import os
import re
import sysconfig
import zipfile
from pathlib import Path

import pytest

from rezero_jax.data import Text, text_files
from rezero_jax.data.text_files import LEFT_OUT, enwik8_text, stdlib_files, stdlib_text, user_text
from rezero_jax.errors import UserError
from tests.data import load


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path):
    files = {
        "b.txt": b"two\n",
        "a/z.txt": b"one",
        "a.txt": b"zero",  # "." sorts before "/"
        "a/deep/er": b"half",
        "c": b"",
        "d": b"\xff\x00",
        ".hidden": b"no",
        ".git/config": b"no",
        "a/.cache/x": b"no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    expected = b"zero\nhalf\none\ntwo\n\n\n\xff\x00"
    assert user_text(str(tmp_path)).tobytes() == expected


def test_links_are_followed_once_and_what_is_no_file_is_named(tmp_path, caplog):
    root, other = tmp_path / "root", tmp_path / "other"
    for path, text in ((root / "a/1", "one"), (other / "2", "two"), (other / "deep/3", "three")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "b").symlink_to(other)  # a folder
    (root / "c").symlink_to(other / "2")  # a file
    (root / "a" / "up").symlink_to(root)  # a cycle
    (other / "deep" / "self").symlink_to(other / "deep")
    (root / "d").symlink_to(other)  # again
    assert user_text(str(root)).tobytes() == b"one\ntwo\nthree\ntwo"
    assert not caplog.messages
    (root / "gone\x1b").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    assert user_text(str(root)).tobytes() == b"one\ntwo\nthree\ntwo"
    assert len(caplog.messages) == 1
    assert re.search(r"no files: 2, such as .*(gone\\x1b|pipe)$", caplog.text.strip())


def test_the_length_of_a_text_is_checked_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", None)
    for name in ("one", "two"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**31 - 1)  # without any blocks on the disk
    for path in (tmp_path / "one", tmp_path):
        with pytest.raises(UserError, match=r"has [\d,]+ bytes; give at most"):
            user_text(str(path))


def test_the_standard_library_is_three_sets_of_its_own_sources():
    files = {part: stdlib_files(part) for part in ("train", "validation", "test")}
    everything = [path for part in files.values() for path in part]
    assert len(set(everything)) == len(everything)
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root).as_posix() for path in everything)
    assert {"argparse.py", "json/decoder.py"} <= set(relative)
    assert all(name.endswith(".py") for name in relative)
    assert not any(set(name.split("/")[:-1]) & LEFT_OUT for name in relative)
    for part, place in (("validation", 10), ("test", 11)):
        assert [path.relative_to(root).as_posix() for path in files[part]] == relative[place::20]
        text = b"".join(path.read_bytes() + b"\n" for path in files[part])
        assert stdlib_text(part).tobytes() == text
        assert len(text) > 50_000


def test_a_path_without_text_is_named(tmp_path, monkeypatch):
    def refused(path: Path | None) -> str:
        with pytest.raises(UserError) as info:
            load("text", path=path and str(path))
        return str(info.value).replace(str(tmp_path), "ROOT")

    (tmp_path / "tales.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert "set --config.data.path=" in refused(None)
    for name, words in (
        ("tale.txt", "did you mean ROOT/tales.txt"),
        ("q/w", "not a file or folder"),
        ("tales.txt", "no text"),
        ("folder", "no text"),
        ("pipe", "not a file or folder"),
    ):
        sentence = refused(tmp_path / name)
        assert sentence.startswith(f"data.path=ROOT/{name} ")
        assert words in sentence

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    (tmp_path / "folder" / "a").touch()
    assert "ROOT/folder/a cannot be read (Permission denied)" in refused(tmp_path / "folder")


TEXT = os.urandom(10_000)


def zipped(content: bytes, member: str = "enwik8") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


ARCHIVE = zipped(TEXT)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the network gives, at first ARCHIVE; TEXT is the right enwik8."""
    served = tmp_path / "server" / "enwik8.zip"
    served.parent.mkdir()
    served.write_bytes(ARCHIVE)
    (tmp_path / "data").mkdir()
    for name, value in (
        ("URL", served.as_uri()),
        ("SHA256", hashlib.sha256(ARCHIVE).hexdigest()),
        ("ARCHIVE_BYTES", len(ARCHIVE)),
        ("BYTES", len(TEXT)),
        ("MD5", hashlib.md5(TEXT).hexdigest()),
    ):
        monkeypatch.setattr(text_files, f"ENWIK8_{name}", value)
    return served


def test_enwik8_is_downloaded_once_and_divided(server, tmp_path):
    for split, content in (("validation", TEXT[9000:9500]), ("test", TEXT[9500:])):
        text = load("enwik8", str(tmp_path / "data"), length=32, eval_split=split)
        assert isinstance(text, Text)
        assert text.train.text.tobytes() == TEXT[:9000]
        assert text.eval.text.tobytes() == content
        server.unlink(missing_ok=True)
    assert [path.name for path in (tmp_path / "data").rglob("*.*")] == ["enwik8.zip"]


def test_a_download_that_fails_leaves_nothing(server, tmp_path, monkeypatch):
    data = tmp_path / "data"
    for content in (zipped(TEXT[::-1]), ARCHIVE[:-100]):
        server.write_bytes(content)
        with pytest.raises(UserError, match=r"download.*checksum"):
            enwik8_text(str(data))
    with pytest.raises(UserError, match="downloads nothing"):
        enwik8_text(str(data), download=False)
    server.unlink()
    with pytest.raises(UserError, match=f"put enwik8.zip into {data}/downloads/manual"):
        enwik8_text(str(data))
    (data / "downloads").rmdir()  # empty
    with pytest.raises(UserError, match=f"no folder {data}.x"):
        enwik8_text(f"{data}.x/y")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("enwik8", TEXT, None),
        ("enwik8.zip", ARCHIVE, None),
        ("enwik8", TEXT[:-1], "9999 bytes"),
        ("enwik8.zip", zipped(TEXT[::-1]), "MD5 .*; delete"),
        ("enwik8.zip", zipped(TEXT, "enwik9"), "archive"),
        ("enwik8.zip", ARCHIVE[:-100], "archive"),
        ("enwik8.zip", zipped(bytes(10**7)), "10000000 bytes"),
        ("enwik8", "pipe", "not a file"),
        ("enwik8.zip", "folder", "not a file"),
    ],
)
def test_a_file_of_the_users_is_used_or_named(name, content, words, server, tmp_path):
    path = tmp_path / "data" / "downloads" / "manual" / name
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        os.mkfifo(path) if content == "pipe" else path.mkdir()
    if words is None:
        server.unlink()
    else:
        with pytest.raises(UserError, match=words) as info:
            enwik8_text(str(tmp_path / "data"))
        assert str(path) in str(info.value)
        path.rmdir() if content == "folder" else path.unlink()
    assert enwik8_text(str(tmp_path / "data")).tobytes() == TEXT
