"""The official TFDS builders, TensorFlow-free, on tiny archives of the official formats.

Only the network is replaced, by a function that serves such an archive.
"""

import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import re
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rezero_jax.data import datasets
from rezero_jax.data.tfds.prepare import encode_png, prepared_builder
from rezero_jax.data.tfds.source import TfdsSource
from rezero_jax.errors import UserError
from tests.data import load, section

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RNG = np.random.default_rng(0)
SIZES = {"train": 35, "test": 9}
LABELS = {part: RNG.integers(0, 10, size, np.uint8) for part, size in SIZES.items()}
IMAGES = {part: RNG.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in SIZES.items()}


def records(part: str) -> list[bytes]:
    """A label each, then 32x32 red, green and blue planes."""
    pairs = zip(LABELS[part], IMAGES[part], strict=True)
    return [bytes([label]) + image.transpose(2, 0, 1).tobytes() for label, image in pairs]


def official_archive() -> bytes:
    train = records("train")
    files = {f"data_batch_{i + 1}.bin": b"".join(train[7 * i : 7 * i + 7]) for i in range(5)}
    files["test_batch.bin"] = b"".join(records("test"))
    files["batches.meta.txt"] = "\n".join([*NAMES, ""]).encode()
    return tar_gz("cifar-10-batches-bin", files)


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def tar_gz(folder: str, files: dict[str, bytes]) -> bytes:
    return tar({f"{folder}/{name}": content for name, content in files.items()}, "w:gz")


ARCHIVE = official_archive()


def serve(
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes | Exception],
    name: str = "cifar10",
    known: dict[str, bytes] | None = None,
) -> list[str]:
    """Serves `files` by address; the registered checksums are those of `known` or `files`.

    Returns the list to which every requested address is added.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.utils import Size

    requested: list[str] = []

    @contextlib.contextmanager
    def open_url(url: str, **kwargs: Any) -> Iterator[tuple[Any, list[bytes]]]:
        requested.append(url)
        served = files[url]
        if isinstance(served, Exception):
            raise served
        yield SimpleNamespace(url=url, headers={}), [served]

    def info(url: str, content: bytes) -> UrlInfo:
        return UrlInfo(
            Size(len(content)), hashlib.sha256(content).hexdigest(), url.rpartition("/")[2]
        )

    right = {url: info(url, content) for url, content in (known or files).items()}
    monkeypatch.setattr(downloader, "_open_url", open_url)
    monkeypatch.setattr(tfds.builder_cls(name), "url_infos", right)
    return requested


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TFDS folder and an empty cache, while the network serves the tiny archive."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    serve(monkeypatch, {URL: ARCHIVE})
    (tmp_path / "tfds").mkdir()
    return tmp_path / "tfds"


def test_the_official_builder_prepares_pixel_exact_data_without_tensorflow(data_dir):
    builder = prepared_builder("cifar10", str(data_dir))
    for part, size in SIZES.items():
        found = {example["id"].decode(): example for example in builder.as_data_source(part)}
        assert found.keys() == {f"{part}_{number:05d}" for number in range(size)}
        for number in range(size):
            example = found[f"{part}_{number:05d}"]
            np.testing.assert_array_equal(example["image"], IMAGES[part][number])
            assert example["label"] == LABELS[part][number]
    info = json.loads((data_dir / "cifar10" / "3.0.2" / "dataset_info.json").read_text())
    assert (info["version"], info["fileFormat"]) == ("3.0.2", "array_record")
    assert builder.info.features["label"].names == NAMES
    assert "tensorflow" not in sys.modules


def rows(image: np.ndarray, label: np.ndarray) -> list[bytes]:
    """The examples as sorted bytes: equal for the same examples in any order."""
    return sorted(bytes([y]) + x.tobytes() for x, y in zip(image, label, strict=True))


def same(dataset: Any, image: Any = IMAGES, label: Any = LABELS) -> bool:
    """Whether a resident data set has these images and labels, in any order."""
    splits = {"train": dataset.train.arrays, "test": dataset.eval.arrays}
    return all(
        rows(arrays["image"], arrays["label"]) == rows(image[part], label[part])
        for part, arrays in splits.items()
    )


def test_any_set_of_labelled_images_is_read_by_its_name(data_dir, caplog):
    with pytest.raises(UserError, match=f"not prepared in {data_dir} .*this .*downloads nothing"):
        datasets.load(section("tfds:cifar10", str(data_dir)), download=False)
    dataset = load("tfds:cifar10:3.0.2", str(data_dir))
    assert same(dataset)
    assert dataset.classes == tuple(NAMES)
    assert load("tfds:cifar10", str(data_dir), image_size=8).example_shape == (8, 8, 3)
    info = data_dir / "cifar10" / "3.0.2" / "dataset_info.json"
    content = json.loads(info.read_text())
    content["splits"] = [split for split in content["splits"] if split["name"] == "train"]
    info.write_text(json.dumps(content))
    for _ in range(2):
        dataset = load("tfds:cifar10", str(data_dir), eval_fraction=0.2)
    assert not caplog.messages  # such as of a cache of the other part
    both = [
        np.concatenate([getattr(dataset, part).arrays[name] for part in ("train", "eval")])
        for name in ("image", "label")
    ]
    assert (dataset.train.size, dataset.eval.size) == (28, 7)
    assert rows(*both) == rows(IMAGES["train"], LABELS["train"])
    with pytest.raises(UserError, match="has no test split"):
        load("cifar10", str(data_dir))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "data set"),
        ("huggingface:mnist", "data set"),  # which would run code
        ("../cifar10", "data set"),
        ("cifra10", 'data set "cifra10"'),
        ("cifar10:1.2.3", r"3\.0\.2"),
        ("imdb_reviews", "images of 8 bits with one label each|not prepared|has no data set"),
    ],
)
def test_a_name_that_is_none_of_labelled_images_is_refused(name, words, data_dir):
    with pytest.raises(UserError, match=words):
        datasets.load(section(f"tfds:{name}", str(data_dir)), download=False)


def test_stream_and_resident_are_the_same_to_the_bit_without_a_cache_too(
    data_dir, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", __file__)  # which cannot be a folder
    resident = load("cifar10", str(data_dir))
    stream = load("cifar10", str(data_dir), stream=True)
    assert (stream.example_shape, stream.num_classes) == ((32, 32, 3), 10)
    for one, other in ((resident.train, stream.train), (resident.eval, stream.eval)):
        assert one.size == other.size
        everything = other.fetch(np.arange(other.size))
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(everything[name], array)
            assert everything[name].dtype == array.dtype
    assert same(resident)
    assert "cannot cache" in caplog.text


def test_a_damaged_cache_file_is_noticed_and_rebuilt(data_dir, tmp_path, caplog):
    expected = load("cifar10", str(data_dir)).train.arrays
    (path,) = (tmp_path / "cache" / "rezero_jax" / "cifar10").glob("train-*.npz")
    good = path.read_bytes()
    pixels = good.index(expected["image"].tobytes())
    assert not caplog.messages

    def check(content: bytes, words: str) -> None:
        path.write_bytes(content)
        for _ in range(2):  # read from the archive, and from the cache
            for name, values in load("cifar10", str(data_dir)).train.arrays.items():
                np.testing.assert_array_equal(values, expected[name])
        (message,) = caplog.messages
        assert re.search(rf"{path.name} is damaged \({words}", message)
        caplog.clear()

    for age, name in ((0, "new"), (4000, "old")):
        (path.parent / f"{name}.partial").touch()
        os.utime(path.parent / f"{name}.partial", (time.time() - age,) * 2)
    pickle = io.BytesIO()
    np.savez(pickle, image=np.array([{}]), label=np.zeros(35, np.int32))
    for content in (good[:-100], b"", pickle.getvalue()):
        check(content, "")
    flipped = bytearray(good)
    flipped[pixels + 35 * 32 * 32 * 3 - 1] ^= 1 << int(RNG.integers(8))
    check(bytes(flipped), "Bad CRC-32")
    assert [left.name for left in path.parent.glob("*.partial")] == ["new.partial"]


def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(data_dir, monkeypatch, caplog):
    import requests

    filters = logging.getLogger("absl").filters.copy()
    failure = requests.ConnectionError("no route\nto host")
    for served, words in ((failure, "no route to host"), (b"x", "wrong checksum")):
        serve(monkeypatch, {URL: served}, known={URL: ARCHIVE})
        with pytest.raises(
            UserError, match=rf'"cifar10" .* {data_dir} .*{words}\); set TFDS_DATA_DIR'
        ):
            load("cifar10", str(data_dir))
        assert [path.name for path in data_dir.rglob("*.*") if path.is_file()] == [
            ".preparing.lock"
        ]
    assert caplog.messages == []
    assert logging.getLogger("absl").filters == filters
    serve(monkeypatch, {URL: ARCHIVE})
    assert same(load("cifar10", str(data_dir)))


def test_interrupted_preparation_is_not_taken_as_prepared(data_dir, monkeypatch):
    from rezero_jax.data.tfds import prepare

    encoded = 0

    def interrupted(image: np.ndarray) -> bytes:
        nonlocal encoded
        encoded += 1
        if encoded > 20:
            raise KeyboardInterrupt
        return encode_png(image)

    monkeypatch.setattr(prepare, "encode_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", str(data_dir))
    assert not (data_dir / "cifar10" / "3.0.2").exists()
    assert (data_dir / "downloads").exists()  # whole: it serves again
    serve(monkeypatch, {URL: OSError("no network")}, known={URL: ARCHIVE})
    monkeypatch.setattr(prepare, "encode_png", encode_png)
    assert load("cifar10", str(data_dir)).train.size == len(LABELS["train"])


def test_a_folder_that_is_missing_is_named_and_not_made(data_dir, tmp_path, monkeypatch):
    for given, hint in (("tfsd", f"did you mean {data_dir}"), ("qwerty/x", "create it")):
        path = tmp_path / given
        monkeypatch.setenv("TFDS_DATA_DIR", str(path))
        for data, where in ((str(path), "data.dir"), (None, "TFDS_DATA_DIR")):
            with pytest.raises(UserError, match=rf"{where}={path}\).*{hint}"):
                load("cifar10", data)
        assert not path.exists()


def test_damaged_files_are_named_and_give_no_wrong_pixels(data_dir, tmp_path):
    load("cifar10", str(data_dir), stream=True)  # which leaves no cache
    folder = data_dir / "cifar10" / "3.0.2"

    def refused(words: str, stream: bool = False) -> None:
        with pytest.raises(UserError, match=words) as info:
            load("cifar10", str(data_dir), stream=stream).train.fetch(np.arange(35))
        assert "\n" not in str(info.value)

    source = TfdsSource(prepared_builder("cifar10", str(data_dir)), "train")
    (path,) = folder.glob("cifar10-train.array_record*")
    good, keys = path.read_bytes(), {source.fingerprint()}
    for place in (0, len(good) // 2, len(good) - 1):  # each byte is in the key of the cache
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        keys.add(source.fingerprint())
    assert len(keys) == 4
    path.write_bytes(good)
    for file in (path, folder / "dataset_info.json"):
        file.rename(tmp_path / "kept")
        os.mkfifo(file)
        refused("is damaged .*No such file|is not a file; delete it")
        (tmp_path / "kept").replace(file)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    path.write_bytes(flipped)
    for stream in (False, True):
        refused(f'"cifar10" in {folder} is damaged', stream)
    path.unlink()
    refused(f"is damaged .*No such file.*{path}")
    path.write_bytes(good)
    info = folder / "dataset_info.json"
    good_info = info.read_text()
    info.write_text(good_info.replace('"array_record"', '"tfrecord"'))
    refused("tfrecord")
    info.write_text("")
    refused(f'"cifar10" .*delete {data_dir}/cifar10')
    info.write_text(good_info)
    assert load("cifar10", str(data_dir)).train.size == 35


@pytest.mark.slow
def test_a_split_too_large_for_memory_opens_few_files_and_two_at_once_prepare_it_once(
    data_dir, monkeypatch
):
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 10_000)
    spilled = []
    iterate = shuffle.Shuffler._iter_buckets

    def spy(shuffler: Any) -> Iterator[Any]:
        spilled.append(len(shuffler.bucket_lengths))
        return iterate(shuffler)

    monkeypatch.setattr(shuffle.Shuffler, "_iter_buckets", spy)
    requested = serve(monkeypatch, {URL: ARCHIVE})
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(prepared_builder, ["cifar10"] * 2, [str(data_dir)] * 2))
    assert requested == [URL]
    assert spilled == [256, 256]
    assert same(load("cifar10", str(data_dir)))
    assert not list(data_dir.rglob("bucket*"))


@pytest.mark.slow
def test_svhn_is_read_from_its_matlab_files(data_dir, monkeypatch):
    from scipy.io import savemat

    files: dict[str, bytes | Exception] = {}
    for part in ("train", "test", "extra"):
        content = io.BytesIO()
        source = part.replace("extra", "test")
        digits = np.where(LABELS[source] == 0, 10, LABELS[source])
        savemat(content, {"X": np.moveaxis(IMAGES[source], 0, -1), "y": digits[:, None]})
        files[f"http://ufldl.stanford.edu/housenumbers/{part}_32x32.mat"] = content.getvalue()
    serve(monkeypatch, files, "svhn_cropped")
    assert same(load("svhn_cropped", str(data_dir)))


@pytest.mark.slow  # the builder insists on 70,000 images
def test_mnist_is_read_from_its_idx_files(data_dir, monkeypatch):
    import tensorflow_datasets as tfds

    root = tfds.builder_cls("mnist").URL
    files: dict[str, bytes | Exception] = {}
    images, labels = {}, {}
    for part, prefix, size in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        images[part] = image = np.zeros((size, 28, 28, 1), np.uint8)
        image[:, :2] = RNG.integers(0, 256, (size, 2, 28, 1))
        labels[part] = label = RNG.integers(0, 10, size, np.uint8)
        files[f"{root}{prefix}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + image.tobytes())
        files[f"{root}{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + label.tobytes())
    serve(monkeypatch, files, "mnist")
    assert same(load("mnist", str(data_dir)), images, labels)
