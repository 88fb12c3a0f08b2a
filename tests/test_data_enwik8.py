"""enwik8's builder end to end on a small archive; only the network is replaced."""

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rezero_jax.data import Text
from rezero_jax.data.tfds.enwik8 import URL, Enwik8, enwik8_bytes
from rezero_jax.errors import UserError
from tests.data import load
from tests.test_data_prepare import serve

TEXT = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8).tobytes()
PARTS = {"train": TEXT[:9000], "validation": TEXT[9000:9500], "test": TEXT[9500:]}


def zipped(content: bytes, member: str = "enwik8") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


ARCHIVE = zipped(TEXT)


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TFDS folder; TEXT is the right enwik8, and ARCHIVE what the network gives."""
    monkeypatch.setattr(Enwik8, "SIZES", {name: len(part) for name, part in PARTS.items()})
    monkeypatch.setattr(Enwik8, "MD5", hashlib.md5(TEXT).hexdigest())
    monkeypatch.setattr(Enwik8, "CHUNK", 700)  # 13 chunks to train, the last a short one
    serve(monkeypatch, {URL: ARCHIVE}, "enwik8")
    return tmp_path / "tfds"


def put(data_dir: Path, name: str, content: bytes) -> Path:
    """A file that the user has put where the builder looks first."""
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    return folder / name


def check_parts(data_dir: Path) -> None:
    for name, part in PARTS.items():
        text = enwik8_bytes(name, str(data_dir))
        assert text.dtype == np.uint8
        assert text.tobytes() == part


def test_what_is_published_about_enwik8() -> None:
    assert list(Enwik8.SIZES.values()) == [90_000_000, 5_000_000, 5_000_000]
    assert Enwik8.url_infos[URL].size == 36_445_475


def test_the_splits_hold_the_bytes_in_their_order_without_tensorflow(data_dir: Path) -> None:
    check_parts(data_dir)
    assert "tensorflow" not in sys.modules


def test_the_module_imports_no_tensorflow() -> None:
    code = "import sys, rezero_jax.data.tfds.enwik8; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("shards", [2, 5])
def test_the_order_survives_several_files(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    from tensorflow_datasets.core.utils.shard_utils import ShardConfig

    def number(config: ShardConfig, size: int, examples: int) -> int:
        return min(shards, examples)

    monkeypatch.setattr(ShardConfig, "get_number_shards", number)
    check_parts(data_dir)
    files = list((data_dir / "enwik8" / "1.0.0").glob("enwik8-train.array_record*"))
    assert len(files) == shards


def test_loading_again_downloads_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_parts(data_dir)
    requested = serve(monkeypatch, {URL: OSError("no network")}, "enwik8", {URL: ARCHIVE})
    check_parts(data_dir)
    assert requested == []


@pytest.mark.parametrize("part", ["validation", "test"])
def test_load_trains_on_the_first_part(data_dir: Path, part: str) -> None:
    text = load("enwik8", str(data_dir), length=32, eval_split=part)
    assert isinstance(text, Text)
    assert text.train.text.tobytes() == PARTS["train"]
    assert text.eval.text.tobytes() == PARTS[part]
    assert text.vocab_size == 256


@pytest.mark.parametrize(("name", "content"), [("enwik8", TEXT), ("enwik8.zip", ARCHIVE)])
def test_a_file_of_the_users_is_used(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    put(data_dir, name, content)
    requested = serve(monkeypatch, {URL: OSError("no network")}, "enwik8", {URL: ARCHIVE})
    check_parts(data_dir)
    assert requested == []


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("enwik8", TEXT[:-1], "enwik8 has 10000 bytes and the one in PATH has 9999; delete that"),
        ("enwik8", TEXT[::-1], "PATH does not hold enwik8, whose MD5 checksum is MD5; delete that"),
        ("enwik8.zip", zipped(TEXT[1:] + b"x"), "PATH does not hold enwik8, whose MD5"),
        ("enwik8.zip", zipped(TEXT, "enwik9"), "PATH is no archive of enwik8 (There is no item"),
        ("enwik8.zip", ARCHIVE[:-100], "PATH is no archive of enwik8 (File is not a zip file)"),
    ],
)
def test_a_wrong_file_of_the_users_is_named(
    data_dir: Path, name: str, content: bytes, sentence: str
) -> None:
    path = put(data_dir, name, content)
    with pytest.raises(UserError) as info:
        enwik8_bytes("train", str(data_dir))
    said = str(info.value).replace(str(path), "PATH").replace(Enwik8.MD5, "MD5")
    assert said.startswith(sentence)
    assert not (data_dir / "enwik8" / "1.0.0").exists()
    path.unlink()
    assert [path.name for path in data_dir.rglob("*")] == ["downloads", "manual"]
    check_parts(data_dir)


def test_a_download_with_the_wrong_checksum_is_refused(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {URL: zipped(TEXT[::-1])}, "enwik8", {URL: ARCHIVE})
    with pytest.raises(UserError, match=r"could not be downloaded \(.* wrong checksum\)"):
        enwik8_bytes("train", str(data_dir))
    assert not data_dir.exists()
    serve(monkeypatch, {URL: ARCHIVE}, "enwik8")
    check_parts(data_dir)


def test_without_a_network_one_sentence_says_what_to_do(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    failure = requests.ConnectionError("no route\nto host")
    serve(monkeypatch, {URL: failure}, "enwik8", {URL: ARCHIVE})
    with pytest.raises(UserError) as info:
        load("enwik8", str(data_dir))
    assert str(info.value) == (
        f'data set "enwik8" is not prepared in {data_dir} and could not be downloaded (no route '
        "to host); set TFDS_DATA_DIR or --config.data.dir to a folder that holds it"
    )


def test_a_damaged_record_file_is_an_error_and_no_wrong_bytes(data_dir: Path) -> None:
    check_parts(data_dir)
    (path,) = (data_dir / "enwik8" / "1.0.0").glob("enwik8-train.array_record*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'"enwik8" in .* is damaged .*delete that folder'):
        enwik8_bytes("train", str(data_dir))


def test_a_missing_record_file_is_named(data_dir: Path) -> None:
    check_parts(data_dir)
    (path,) = (data_dir / "enwik8" / "1.0.0").glob("enwik8-test.array_record*")
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing"):
        enwik8_bytes("train", str(data_dir))
