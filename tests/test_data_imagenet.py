"""ImageNet on a tiny set: prepared by the official builder from tiny archives, and streamed.

The archives have the layout of the real ones. Among the images are those that the real set is known
for: grey, CMYK, a PNG with the name of a JPEG, very wide ones, and large ones.
"""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from rezero_jax.data import Dataset, Order
from rezero_jax.data.pixels import MEAN, STD, Crop
from rezero_jax.data.tfds.prepare import allow_open_files, prepared_builder
from rezero_jax.errors import UserError
from tests.data import load
from tests.test_data_crops import encoded
from tests.test_data_prepare import tar

SIZE = 32

TRAIN = {
    "n01440764": {"n01440764_1.JPEG": encoded(60, 45), "n01440764_2.JPEG": encoded(45, 60, "L")},
    "n01739381": {"n01739381_1309.JPEG": encoded(50, 50, "CMYK")},  # one that the builder knows
    "n02105855": {
        "n02105855_2933.JPEG": encoded(70, 50, kind="PNG"),  # the one that is a PNG
        "n02105855_7.JPEG": encoded(300, 20),
        "n02105855_8.JPEG": encoded(520, 400, noise=0),  # large enough to be decoded at 1/2 or 1/4
        "n02105855_9.JPEG": encoded(20, 30),  # smaller than the result
    },
}
EVAL = {
    f"ILSVRC2012_val_{number:08d}.JPEG": encoded(width, height)
    for number, (width, height) in enumerate(
        [(60, 45), (45, 61), (320, 40), (600, 410), (SIZE, SIZE), (400, 601)], 1
    )
}
# Of the first six images, as published.
EVAL_NOUNS = ("n01751748", "n09193705", "n02105855", "n04263257", "n03125729", "n01735189")

ARCHIVES = {
    "ILSVRC2012_img_train.tar": tar({f"{k}.tar": tar(files) for k, files in TRAIN.items()}),
    "ILSVRC2012_img_val.tar": tar(EVAL),
}


def put_archives(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts ARCHIVES where the user has to, and has the builder expect their sizes."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.utils import Size

    infos = {
        f"http://image-net.org/{name}": UrlInfo(Size(len(content)), "", name)
        for name, content in ARCHIVES.items()
    }
    monkeypatch.setattr(tfds.builder_cls("imagenet2012"), "url_infos", infos)
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    for name, content in ARCHIVES.items():
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with the tiny set, prepared from the archives, which are gone."""
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_archives(folder, monkeypatch)
        prepared_builder("imagenet2012", str(folder))
    for name in ARCHIVES:
        (folder / "downloads" / "manual" / name).unlink()
    return folder


@pytest.fixture
def dataset(data_dir: Path) -> Dataset:
    return load("imagenet", str(data_dir), image_size=SIZE, seed=5)


def test_the_official_builder_keeps_every_file_byte_for_byte(data_dir):
    import tensorflow_datasets as tfds

    builder = prepared_builder("imagenet2012", str(data_dir))
    labels = builder.info.features["label"]
    nouns = dict(zip(EVAL, EVAL_NOUNS, strict=True))
    wanted = {
        "train": {name: (x, noun) for noun, files in TRAIN.items() for name, x in files.items()},
        "validation": {name: (content, nouns[name]) for name, content in EVAL.items()},
    }
    for part, files in wanted.items():
        source = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
        found = {e["file_name"].decode(): (e["image"], labels.int2str(e["label"])) for e in source}
        assert found == files
        assert len(source) == len(files)
    assert "tensorflow" not in sys.modules


def test_batches_are_the_crops_of_their_step_or_central_crops(dataset):
    assert (dataset.train.size, dataset.eval.size) == (7, 6)
    assert dataset.train.resident == dataset.eval.resident == {}
    assert (dataset.example_shape, dataset.num_classes) == ((SIZE, SIZE, 3), 1000)
    assert (dataset.mean, dataset.std) == (MEAN, STD)
    order = Order(seed=5, size=7, batch_size=3)
    visited = []
    for step, batch in enumerate(dataset.train.batches(order.indices, 0, 7)):
        examples = dataset.train.source.__getitems__(order.indices(step).tolist())
        assert (batch["image"].shape, batch["image"].dtype) == ((3, SIZE, SIZE, 3), np.uint8)
        assert (batch["label"].shape, batch["label"].dtype) == ((3,), np.int32)
        np.testing.assert_array_equal(batch["label"], [example["label"] for example in examples])
        for position, (pixels, example) in enumerate(zip(batch["image"], examples, strict=True)):
            expected = Crop(SIZE, seed=5)(example["image"], step, position)
            np.testing.assert_array_equal(pixels, expected)
            visited.append(example["file_name"].decode())
    names = sorted(name for files in TRAIN.values() for name in files)
    assert [sorted(visited[i : i + 7]) for i in (0, 7, 14)] == [names] * 3
    examples = dataset.eval.source.__getitems__(list(range(6)))
    batch = dataset.eval.fetch(np.arange(6))
    np.testing.assert_array_equal(batch["label"], [example["label"] for example in examples])
    for pixels, example in zip(batch["image"], examples, strict=True):
        np.testing.assert_array_equal(pixels, Crop(SIZE)(example["image"]))


def test_missing_and_damaged_archives_are_named_with_their_place_and_source(tmp_path, monkeypatch):
    name = "ILSVRC2012_img_val.tar"
    with pytest.raises(UserError, match=r"https://image-net\.org/") as info:
        load("imagenet", str(tmp_path))
    folder, size = tmp_path / "downloads" / "manual", len(ARCHIVES[name])
    for word in (*ARCHIVES, str(folder), "--config.data.dir"):
        assert word in str(info.value)
    put_archives(tmp_path, monkeypatch)
    for content in (None, ARCHIVES[name][:-1024]):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"put {name} \({size} bytes\) into"):
            load("imagenet", str(tmp_path))
    (folder / name).write_bytes(bytes([1]) * size)
    with pytest.raises(UserError, match=r'"imagenet2012" in .* is damaged'):
        load("imagenet", str(tmp_path))
    assert not (tmp_path / "imagenet2012" / "5.1.0").exists()


def test_more_files_may_be_open_than_the_system_allows_at_first(data_dir):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        load("imagenet", str(data_dir), image_size=SIZE)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1024
        allow_open_files(1088)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1088 + 256
        if before[1] != resource.RLIM_INFINITY:
            with pytest.raises(UserError, match=f"and the system allows {before[1]}; raise the"):
                allow_open_files(before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
